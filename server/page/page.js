"use strict";

// What the server measures, once a second; chat.js, which comes after, is the chat.

const NUM_POINTS = 300;
const POLL_MS = 1000;
const by = (id) => document.getElementById(id);
const style = getComputedStyle(document.documentElement);
const color = (name) => style.getPropertyValue(name).trim();

// The key stays in this tab.
let key = sessionStorage.getItem("key") || "";
let began = null;
let last = -1;
let numDraftTokens = null;
// Seconds since 1970, for the axes tell the time of day.
const series = { time: [], length: [], speed: [], running: [], waiting: [] };

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    by("key-form").hidden = false;
    throw new Error("an API key is needed");
  }
  by("key-form").hidden = true;
  return answer;
}

// Measurements

function chart(id, lines, range, steps) {
  const axis = { stroke: color("--faint"), grid: { stroke: color("--line") }, ticks: { show: false } };
  const clock = (_, ticks) => ticks.map((t) => new Date(1000 * t).toLocaleTimeString("en-GB"));
  const box = by(id);
  const plot = new uPlot({
    width: box.clientWidth,
    height: box.clientHeight,
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: false }, y: { range } },
    axes: [
      { ...axis, values: clock, size: 28, space: 90, incrs: [1, 2, 5, 10, 20, 30, 60, 120] },
      { ...axis, size: 46, ...(steps && { incrs: steps }) },
    ],
    series: [{}, ...lines.map(([label, name]) => ({
      label, stroke: color(name), width: 2, points: { show: true, size: 3, fill: color(name) },
    }))],
  }, [[], ...lines.map(() => [])], box);
  new ResizeObserver(() => plot.setSize({ width: box.clientWidth, height: box.clientHeight }))
    .observe(box);
  return plot;
}

const fromZero = (_, low, high) => [0, Math.max(high * 1.1, 1)];
const lengths = (_, low, high) => [1, Math.max(high, (numDraftTokens || 1) + 1)];
const charts = [
  [chart("length-chart", [["length", "--draft"]], lengths, [1, 2, 5]), ["length"]],
  [chart("speed-chart", [["tokens/s", "--ink"]], fromZero), ["speed"]],
  [chart("load-chart", [["running", "--draft"], ["waiting", "--own"]], fromZero,
    [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]), ["running", "waiting"]],
];

function showPositions(speculation) {
  const box = by("positions");
  const rates = speculation.judged_at.map((n, i) => (n ? speculation.accepted_at[i] / n : 0));
  if (box.querySelectorAll("meter").length !== rates.length) {
    box.replaceChildren(...rates.flatMap((_, i) => {
      const name = document.createElement("span");
      name.textContent = `draft ${i + 1}`;
      const meter = document.createElement("meter");
      meter.setAttribute("aria-label", `share of drafts accepted at position ${i + 1}`);
      return [name, meter, document.createElement("span")];
    }));
  }
  rates.forEach((rate, i) => {
    box.querySelectorAll("meter")[i].value = rate;
    box.children[3 * i + 2].textContent = `${(100 * rate).toFixed(1)} %`;
  });
  if (!rates.length) box.textContent = "no draft was judged yet";
}

function showStatus(status, totals) {
  const state = !status.alive ? "the engine is dead" : status.hung ? "the engine hangs"
    : status.ready ? "ready" : "not ready";
  by("state").textContent = state;
  by("state").className = state === "ready" ? "" : "bad";
  by("model").textContent = status.num_draft_tokens
    ? `${status.model}, ${status.num_draft_tokens} drafts a step` : `${status.model}, no draft`;
  const { steps, length, rate } = totals.speculation;
  by("length").textContent = steps ? length.toFixed(2) : "–";
  by("rate").textContent = steps ? `${(100 * rate).toFixed(1)} %` : "–";
  by("running").textContent = status.num_running;
  by("waiting").textContent = status.num_waiting;
  by("kv").textContent = `${(100 * status.kv_usage).toFixed(1)} %`;
  if (numDraftTokens !== status.num_draft_tokens) {
    numDraftTokens = status.num_draft_tokens;
    const counts = Array.from({ length: numDraftTokens + 1 }, (_, k) => k);
    by("drafts").replaceChildren(...counts.map((k) => new Option(k, k, false, k === numDraftTokens)));
    by("compare").disabled = !numDraftTokens;
  }
}

function addSamples(samples, began) {
  for (const sample of samples) {
    last = sample.number;
    series.time.push(began + sample.time);
    series.length.push(sample.steps ? sample.length : null);
    series.speed.push(sample.output_rate);
    series.running.push(sample.num_running);
    series.waiting.push(sample.num_waiting);
    by("speed").textContent = sample.output_rate.toFixed(sample.output_rate < 100 ? 1 : 0);
  }
  for (const name in series) series[name] = series[name].slice(-NUM_POINTS);
  if (!samples.length) return;
  for (const [plot, names] of charts) {
    plot.setData([series.time, ...names.map((name) => series[name])]);
  }
}

async function poll() {
  try {
    const answer = await ask(`/page/data?after=${last}`);
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const data = await answer.json();
    if (began !== null && began !== data.began) {
      // Another server, which counts from 0 again.
      last = -1;
      for (const name in series) series[name] = [];
    } else {
      addSamples(data.samples, data.began);
    }
    began = data.began;
    showStatus(data.status, data.totals);
    showPositions(data.totals.speculation);
  } catch (error) {
    by("state").textContent = error.message;
    by("state").className = "bad";
  }
  setTimeout(poll, POLL_MS);
}

by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = by("key").value;
  sessionStorage.setItem("key", key);
});

poll();
