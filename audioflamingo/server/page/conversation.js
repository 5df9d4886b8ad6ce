// Questions and answers. The server keeps nothing between two questions: each carries all turns before it, and
// the clips where they were first asked about.

import { chat } from "./api.js";
import { announce, byId, fromTemplate, part, showText } from "./dom.js";
import { describe, isStop, showNotice } from "./errors.js";

/** One question and what became of it. */
class Turn {
  constructor(question, clips) {
    Object.assign(this, { question, clips, answer: "", root: fromTemplate("turn-template") });
    part(this.root, "question").textContent = question;
    showText(part(this.root, "clips"), clips.map((clip) => clip.name).join(", "));
  }

  begin() {
    this.answer = "";
    part(this.root, "answer").textContent = "";
    showText(part(this.root, "thoughts"), "");
    part(this.root, "notice").replaceChildren();
    this.setBusy(true);
  }

  append(text) {
    this.answer += text;
    part(this.root, "answer").append(text);
    if (this.answer) part(this.root, "waiting").hidden = true;
  }

  /** What the model thinks before it answers; no part of the conversation. */
  think(text) {
    const thoughts = part(this.root, "thoughts");
    if (text) showText(thoughts, thoughts.textContent + text);
    if (text) part(this.root, "waiting").hidden = true;
  }

  /** Screen readers read the answer when it is complete, not word by word. */
  setBusy(isBusy) {
    this.root.setAttribute("aria-busy", isBusy);
    part(this.root, "waiting").hidden = !isBusy;
  }

  note(text) {
    showText(part(this.root, "note"), text);
  }

  /** The turn as messages; clips that the user has removed are left out. */
  async toMessages(clips) {
    const parts = await Promise.all(this.clips.filter((clip) => clips.includes(clip)).map((clip) => clip.toPart()));
    const content = parts.length ? [...parts, { type: "text", text: this.question }] : this.question;
    const answer = this.answer ? [{ role: "assistant", content: this.answer }] : [];
    return [{ role: "user", content }, ...answer];
  }
}

export class Conversation {
  /**
   * `getClips()` returns the clips on the page, `getModel()` promises the model's name, `onRefused(error, retry)`
   * may take an error over, `onChange()` is called when an answer begins or ends.
   */
  constructor({ getClips, getModel, onRefused, onChange }) {
    Object.assign(this, { getClips, getModel, onRefused, onChange, turns: [], running: null });
  }

  /** Clips that no answered question has brought along. */
  get newClips() {
    const known = this.turns.filter((turn) => turn.answer).flatMap((turn) => turn.clips);
    return this.getClips().filter((clip) => !known.includes(clip));
  }

  async ask(question) {
    // A question without an answer is no part of the conversation.
    this.turns = this.turns.filter((turn) => turn.answer);
    const turn = new Turn(question, this.newClips);
    this.turns.push(turn);
    byId("messages").append(turn.root);
    await this.run(turn);
  }

  async run(turn) {
    const running = new AbortController();
    this.running = running;
    turn.begin();
    turn.note("");
    this.onChange();
    this.showEnd();
    try {
      await this.read(turn, running.signal);
    } catch (error) {
      if (isStop(error)) turn.note("Stopped.");
      else this.showError(turn, error);
    }
    turn.setBusy(false);
    if (this.running !== running) return; // a new conversation has begun
    this.running = null;
    this.onChange();
    this.showEnd();
  }

  async read(turn, signal) {
    const model = await this.getModel();
    const messages = (await Promise.all(this.turns.map((t) => t.toMessages(this.getClips())))).flat();
    for await (const event of chat(model, messages, signal)) {
      const choice = event.choices[0];
      const isAtEnd = this.isAtEnd();
      turn.think(choice?.delta.reasoning_content ?? "");
      turn.append(choice?.delta.content ?? "");
      if (choice?.finish_reason === "length") turn.note("The answer was cut at its greatest length.");
      if (isAtEnd) this.showEnd();
    }
    if (!turn.answer) turn.note("The model had nothing to say.");
    announce("Answer complete.");
  }

  showError(turn, error) {
    // Asked once more, the question is the newest of the turns again.
    const retry = () => {
      if (this.running) return;
      this.turns = [...this.turns.filter((other) => other !== turn && other.answer), turn];
      byId("messages").append(turn.root);
      this.run(turn);
    };
    if (this.onRefused(error, retry)) turn.note(describe(error));
    else showNotice(part(turn.root, "notice"), describe(error), retry);
  }

  /** Stops the answer; false if none is running. */
  stop() {
    this.running?.abort();
    return this.running !== null;
  }

  clear() {
    this.stop();
    this.running = null;
    this.turns = [];
    byId("messages").replaceChildren();
    this.onChange();
  }

  /** Whether the reader follows the newest line; who has scrolled up is left in peace. */
  isAtEnd() {
    const { bottom } = byId("messages").getBoundingClientRect();
    return bottom - byId("ask").getBoundingClientRect().top < 80;
  }

  showEnd() {
    byId("messages").lastElementChild?.scrollIntoView({ block: "end" });
  }
}
