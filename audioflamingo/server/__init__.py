"""An HTTP server that clients of OpenAI's interface use unchanged: `af3 serve`.

engine/ gives the answers; the other modules read requests, look after limits and safety, and write replies.
"""
