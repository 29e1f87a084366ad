"use strict";

// The chat: answers as they come, tinted, alone or one without drafts beside one with them.

const MARKER = /^(<\/?mm:think>|\]~!?b\[|\]~b\]|\[e~\[|\]<\]minimax\[>\[)$/;
const PART = "\ufffd";
// How far ahead the token of a character is looked for.
const NEAR = 64;
let messages = [];
let running = null;

function add(kind, text = "", parent = by("messages")) {
  const box = document.createElement("div");
  box.className = kind;
  box.textContent = text;
  parent.append(box);
  showEnd();
  return box;
}

function showEnd() {
  by("messages").scrollTop = by("messages").scrollHeight;
  // On a narrow screen the page scrolls in its place.
  by("chat").scrollIntoView({ block: "nearest" });
}

// Server-sent events of a response, as parsed JSON, until [DONE].
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

// Writes an answer into a box. The text is that of the API, in which markers are missing and
// characters whole; the tokens tell what was drafted, so each character is looked for in them.
class Writer {
  constructor(box) {
    this.box = box;
    this.thinking = null;
    this.entries = [];
    this.drafted = false;
  }

  tokens(tokens) {
    for (const { text, drafted } of tokens) {
      if (MARKER.test(text)) this.entries.push({ text, drafted, marker: true });
      else for (const char of text) this.entries.push({ text: char, drafted, marker: false });
    }
  }

  think(text) {
    if (!this.thinking) {
      this.thinking = document.createElement("div");
      this.thinking.className = "thinking";
      this.box.append(this.thinking);
    }
    this.write(text, this.thinking);
  }

  write(text, box = this.box) {
    let run = "";
    for (const char of text) {
      const drafted = this.take(char, box);
      if (run && drafted !== this.drafted) {
        this.span(run, this.drafted, "", box);
        run = "";
      }
      run += char;
      this.drafted = drafted;
    }
    if (run) this.span(run, this.drafted, "", box);
  }

  // Whether a character was drafted; markers before it are shown as such.
  take(char, box) {
    const entries = this.entries;
    this.passMarkers(box);
    if (entries.length && entries[0].text === PART && char !== PART) {
      let { drafted } = entries[0];
      while (entries.length && entries[0].text === PART) ({ drafted } = entries.shift());
      return drafted;
    }
    const at = entries.slice(0, NEAR).findIndex((entry) => entry.text === char);
    if (at < 0) return this.drafted;
    return entries.splice(0, at + 1)[at].drafted;
  }

  passMarkers(box = this.box) {
    while (this.entries.length && this.entries[0].marker) {
      const { text, drafted } = this.entries.shift();
      this.span(text, drafted, "marker", box);
    }
  }

  span(text, drafted, kind, box) {
    const span = document.createElement("span");
    span.textContent = text;
    if (kind) span.classList.add(kind);
    if (drafted) span.classList.add("drafted");
    box.append(span);
  }
}

// Ask the conversation so far, with at most ``drafts`` a step, and write the answer into a box.
async function answer(box, drafts, more = {}) {
  const writer = new Writer(box);
  const found = { drafts, content: "", numTokens: 0, numSteps: 0, seconds: 0, metrics: null };
  const begin = performance.now();
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    signal: running.signal,
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      messages,
      stream: true,
      max_tokens: Number(by("max-tokens").value),
      temperature: Number(by("temperature").value),
      speculation: { num_draft_tokens: drafts, tokens: true, report: true },
      ...more,
    }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const chunk of eventsOf(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.metrics) found.metrics = chunk.metrics.speculative_decoding;
    for (const choice of chunk.choices) {
      const tokens = choice.tokens || [];
      found.numTokens += tokens.length;
      found.numSteps += tokens.length > 0;
      writer.tokens(tokens);
      if (choice.delta.reasoning_content) writer.think(choice.delta.reasoning_content);
      if (choice.delta.content) writer.write(choice.delta.content);
      found.content += choice.delta.content || "";
    }
    showEnd();
  }
  writer.passMarkers();
  found.seconds = (performance.now() - begin) / 1000;
  return found;
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function summary({ numTokens, numSteps, seconds, metrics }) {
  const text = `${plural(numTokens, "token")} in ${plural(numSteps, "step")}, `
    + `${seconds.toFixed(2)} s, ${(numTokens / seconds).toFixed(1)} tokens/s`;
  if (!metrics || !metrics.num_spec_steps) return `${text}, without drafts`;
  return `${text}, acceptance length ${metrics.mean_acceptance_length.toFixed(2)}, `
    + `${(100 * metrics.draft_acceptance_rate).toFixed(1)} % of drafts accepted`;
}

function showNewest({ numTokens, numSteps, seconds, metrics }) {
  const judged = metrics && metrics.num_spec_steps;
  by("newest-speed").textContent = (numTokens / seconds).toFixed(1);
  by("newest-length").textContent = judged ? metrics.mean_acceptance_length.toFixed(2) : "–";
  by("newest-rate").textContent = judged
    ? `${(100 * metrics.draft_acceptance_rate).toFixed(1)} %` : "–";
  by("newest-tokens").textContent = numTokens;
  by("newest-steps").textContent = numSteps;
  by("newest-seconds").textContent = seconds.toFixed(2);
}

async function answerOnce() {
  const found = await answer(add("answer"), Number(by("drafts").value));
  add("note", summary(found));
  showNewest(found);
  return found;
}

// The same question twice, one after the other: the same seed, and no help from the prefix cache.
async function answerTwice() {
  const [seed, ...salts] = crypto.getRandomValues(new Uint32Array(3));
  const drafts = Number(by("drafts").value) || numDraftTokens;
  const pair = add("pair");
  const columns = [[0, "without drafts"], [drafts, `with ${plural(drafts, "draft")} a step`]];
  const boxes = columns.map(([, title]) => {
    const side = add("side", "", pair);
    add("title", title, side);
    return add("answer", "", side);
  });
  const found = [];
  for (const [i, [count]] of columns.entries()) {
    found.push(await answer(boxes[i], count, { seed, cache_salt: `compare-${salts[i]}` }));
    add("note", summary(found[i]), boxes[i].parentElement);
  }
  showVerdict(...found, ...boxes.map((box) => box.textContent));
  showNewest(found[1]);
  return found[1];
}

function showVerdict(plain, drafted, plainText, draftedText) {
  const box = add("verdict");
  if (plainText === draftedText) {
    box.textContent = `The texts are equal. With drafts: ${plural(drafted.numSteps, "step")} `
      + `instead of ${plain.numSteps}, ${drafted.seconds.toFixed(2)} s instead of `
      + `${plain.seconds.toFixed(2)} s (${(plain.seconds / drafted.seconds).toFixed(2)} times as fast).`;
  } else {
    let at = 0;
    while (plainText[at] === draftedText[at]) at += 1;
    box.classList.add("bad");
    box.textContent = `The texts differ from character ${at + 1} on. eaglerun lossless explains `
      + "such a difference.";
  }
  showEnd();
}

by("chat").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const question = by("question").value.trim();
  if (!question) return;
  by("question").value = "";
  add("user", question);
  const before = messages;
  messages = [...messages, { role: "user", content: question }];
  running = new AbortController();
  by("send").textContent = "Stop";
  try {
    const found = await (by("compare").checked ? answerTwice() : answerOnce());
    messages.push({ role: "assistant", content: found.content });
  } catch (error) {
    messages = before;
    add("note bad", error.name === "AbortError" ? "stopped" : error.message);
  }
  running = null;
  by("send").textContent = "Send";
});

by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !running) {
    event.preventDefault();
    by("chat").requestSubmit();
  }
});

by("clear").addEventListener("click", () => {
  messages = [];
  by("messages").replaceChildren();
});

by("markers").addEventListener("change", () => {
  by("messages").classList.toggle("with-markers", by("markers").checked);
});
