"""The only place that turns prompts into tokens. Import what you need from its modules; README and docs say how."""
