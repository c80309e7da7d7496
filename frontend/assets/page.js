// The status page: asks for /blockplane/status once a second while it is visible, and streams
// answers of /v1/chat/completions. No library, no request to anywhere else.

const WINDOW_S = 120;
const POLL_MS = 1000;
const $ = (id) => document.getElementById(id);

// ---- numbers -------------------------------------------------------------------------------

const number = (n, digits = 0) => n.toLocaleString("en-US", { maximumFractionDigits: digits });
const millis = (ms) => (ms == null ? "–" : ms < 10 ? `${ms.toFixed(2)} ms` : ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`);
const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(0)} %`);

function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) {
    n /= 1000;
    unit += 1;
  }
  return `${number(n, n < 10 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

// ---- small DOM helpers ---------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- charts --------------------------------------------------------------------------------

/** A round number at or above `max`, so that the axis reads well. */
function ceiling(max) {
  if (max <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(max));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= max);
}

/** Draws series of {at, value} with `at` in seconds before now, as lines or as dots. */
function chart(svg, series, { dots = false, unit = "" } = {}) {
  const width = svg.clientWidth || 400;
  const height = svg.clientHeight || 150;
  const left = 44;
  const bottom = 18;
  const top = ceiling(Math.max(0, ...series.flat().map((point) => point.value)));
  const x = (at) => left + (width - left - 6) * (1 - at / WINDOW_S);
  const y = (value) => 8 + (height - bottom - 8) * (1 - value / top);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  for (const share of [0, 0.5, 1]) {
    svg.append(drawing("line", { x1: left, x2: width - 6, y1: y(share * top), y2: y(share * top) }));
    svg.append(drawing("text", { x: left - 6, y: y(share * top) + 4, "text-anchor": "end" }, number(share * top, 1)));
  }
  svg.append(drawing("text", { x: left, y: height - 4 }, `${WINDOW_S} s ago`));
  svg.append(drawing("text", { x: width - 6, y: height - 4, "text-anchor": "end" }, "now"));
  series.forEach((points, index) => {
    const color = index === 0 ? "a" : "b";
    const inside = points.filter((point) => point.at <= WINDOW_S);
    if (dots) {
      for (const point of inside) svg.append(drawing("circle", { class: color, cx: x(point.at), cy: y(point.value), r: 3 }));
    } else if (inside.length > 1) {
      const path = inside.map((point, n) => `${n === 0 ? "M" : "L"}${x(point.at).toFixed(1)},${y(point.value).toFixed(1)}`);
      svg.append(drawing("path", { class: color, d: path.join("") }));
    }
  });
  const last = series.map((points) => (points.length ? `${number(points.at(-1).value, 1)}${unit}` : "none"));
  svg.setAttribute("aria-label", `latest values: ${last.join(", ")}`);
}

// ---- the status ----------------------------------------------------------------------------

const history = [];
let online = false;

function rates() {
  const points = { output: [], prompt: [], moved: [] };
  const now = history.at(-1)?.time ?? 0;
  for (let n = 1; n < history.length; n += 1) {
    const [before, after] = [history[n - 1], history[n]];
    const seconds = (after.time - before.time) / 1000;
    if (seconds <= 0) continue;
    const at = (now - after.time) / 1000;
    for (const key of Object.keys(points)) {
      // A restarted process counts from zero again.
      points[key].push({ at, value: Math.max(0, (after[key] - before[key]) / seconds) });
    }
  }
  return points;
}

function remember(status) {
  const loads = status.workers.flatMap((worker) => worker.load);
  // Both ends of a transfer count it.
  const moved = loads.reduce((sum, load) => sum + load.transfer_bytes_total, 0) / 2;
  const time = performance.now();
  // Looks in quick succession would show as peaks.
  if (time - (history.at(-1)?.time ?? -POLL_MS) < POLL_MS / 2) return;
  history.push({ time, output: status.totals.output_tokens, prompt: status.totals.prompt_tokens, moved });
  while (history.length > WINDOW_S + 2) history.shift();
}

function tiles(status, points) {
  const latest = (key) => points[key].at(-1)?.value ?? 0;
  const totals = status.totals;
  const hit = totals.prompt_tokens > 0 ? totals.cached_tokens / totals.prompt_tokens : null;
  const values = [
    ["Requests in flight", number(totals.in_flight)],
    ["Requests served", number(totals.requests - totals.in_flight - totals.failed)],
    ["Failed", number(totals.failed)],
    ["Tokens/s", number(latest("output"), 1)],
    ["Prompt tokens reused", percent(hit)],
    ["KV moved now", `${bytes(latest("moved"))}/s`],
  ];
  $("tiles").replaceChildren(...values.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function bar(name, total, parts, note) {
  const filled = Object.entries(parts).filter(([, count]) => count > 0);
  const words = filled.map(([kind, count]) => `${number(count)} ${kind}`).join(", ") || "empty";
  const box = element("span", { class: "bar", role: "img", "aria-label": `${name}: ${words} of ${number(total)} blocks` });
  for (const [kind, count] of filled) {
    const part = element("i", { class: kind });
    part.style.width = `${(100 * count) / total}%`;
    box.append(part);
  }
  return element("div", { class: "tier" }, element("span", {}, name), box, element("span", {}, note));
}

function tiers(load, rank) {
  const rows = [];
  const used = load.blocks_active + load.blocks_cached + load.blocks_quarantined;
  const parts = { active: load.blocks_active, cached: load.blocks_cached, quarantined: load.blocks_quarantined };
  rows.push(bar(`G1${rank}`, load.blocks_total, parts, `${number(used)} of ${number(load.blocks_total)}`));
  const lower = load.lower;
  for (const [name, kind] of [["G2 host", "host"], ["G3 disk", "disk"]]) {
    const total = lower[`${kind}_blocks_total`];
    const held = lower[`${kind}_blocks_used`];
    if (total > 0) rows.push(bar(name, total, { cached: held }, `${number(held)} of ${number(total)}`));
  }
  if (lower.remote_blocks > 0) {
    rows.push(element("div", { class: "tier" }, element("span", {}, "G4 remote"), element("span"), element("span", {}, `${number(lower.remote_blocks)} known`)));
  }
  return rows;
}

function workers(status) {
  const shown = status.workers.toSorted((a, b) => a.role.localeCompare(b.role) || a.name.localeCompare(b.name)).map((worker) => {
    const running = worker.load.reduce((sum, load) => sum + load.requests_running, 0);
    const waiting = worker.load.reduce((sum, load) => sum + load.requests_waiting, 0);
    const state = element("span", { class: `pill ${worker.state === "ready" ? "good" : "bad"}` }, worker.state);
    const title = element("h3", {}, worker.name, element("small", {}, `${worker.role}, ${running} running, ${waiting} waiting`), state);
    const ranked = worker.load.length > 1;
    return element("div", { class: "worker" }, title, ...worker.load.flatMap((load) => tiers(load, ranked ? ` rank ${load.rank}` : "")));
  });
  $("workers").replaceChildren(...(shown.length ? shown : ["no worker is connected"]));
}

function reused(record) {
  if (record.cached.tokens === 0) return "0";
  const parts = ["g1", "g2", "g3", "g4"].filter((tier) => record.cached[tier] > 0);
  return `${number(record.cached.tokens)} (${parts.map((tier) => tier.toUpperCase()).join(" ")})`;
}

function requests(status) {
  const rows = status.recent.slice(0, 12).map((record) => {
    const moved = record.transfer.blocks > 0 ? `${number(record.transfer.blocks)} blocks, ${bytes(record.transfer.bytes)}` : "–";
    const cells = [record.id || "–", record.outcome, number(record.prompt_tokens), number(record.output_tokens), reused(record), moved,
      record.transfer.lane ?? "–", percent(record.transfer.overlap), millis(record.ttft_ms), millis(record.itl_ms), millis(record.total_ms)];
    const bad = record.outcome === "error" || record.outcome === "disconnected";
    return element("tr", {}, ...cells.map((cell, n) => element("td", n === 1 && bad ? { class: "bad" } : {}, cell)));
  });
  $("requests").replaceChildren(...rows);
}

function latencies(status) {
  const points = { ttft: [], itl: [] };
  for (const record of status.recent.toReversed()) {
    const at = (status.now_unix_ms - record.started_unix_ms) / 1000;
    if (record.ttft_ms != null) points.ttft.push({ at, value: record.ttft_ms });
    if (record.itl_ms != null) points.itl.push({ at, value: record.itl_ms });
  }
  return points;
}

function models(status) {
  const select = $("model");
  const names = status.models.map((model) => model.id);
  const shown = [...select.options].map((option) => option.value);
  if (names.join("\n") === shown.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
}

function health(text, kind) {
  const pill = $("health");
  if (pill.textContent === text) return;
  pill.textContent = text;
  pill.className = `pill ${kind}`;
}

function show(status) {
  remember(status);
  const points = rates();
  health(status.ready ? "ready" : status.reason || "not ready", status.ready ? "good" : "bad");
  $("about").textContent = `${status.models.map((model) => model.id).join(", ")} · version ${status.version} · up ${number(status.uptime_s)} s`;
  tiles(status, points);
  chart($("chart-tokens"), [points.output, points.prompt]);
  const late = latencies(status);
  chart($("chart-latency"), [late.ttft, late.itl], { dots: true, unit: " ms" });
  workers(status);
  requests(status);
  models(status);
}

async function poll() {
  if (document.hidden) return;
  try {
    const response = await fetch("/blockplane/status", { signal: AbortSignal.timeout(5000) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    show(await response.json());
    online = true;
  } catch {
    health(online ? "connection lost" : "no answer", "bad");
  }
}

async function follow() {
  await poll();
  setTimeout(follow, POLL_MS);
}

// ---- asking --------------------------------------------------------------------------------

let asking = null;

/** The data of each server-sent event of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}

async function cost(id) {
  const response = await fetch(`/blockplane/requests/${encodeURIComponent(id)}`);
  if (!response.ok) return "";
  const record = await response.json();
  const moved = record.transfer.blocks > 0
    ? `${number(record.transfer.blocks)} KV blocks (${bytes(record.transfer.bytes)}) over ${record.transfer.lane}, ${percent(record.transfer.overlap)} overlapped`
    : "no KV moved between workers";
  return `${number(record.prompt_tokens)} prompt tokens, ${reused(record)} reused · ${moved} · first token ${millis(record.ttft_ms)}, then ${millis(record.itl_ms)} each`;
}

async function ask(event) {
  event.preventDefault();
  if (asking) return;
  const answer = $("answer");
  asking = new AbortController();
  answer.replaceChildren();
  answer.className = "";
  $("cost").textContent = "";
  $("send").disabled = true;
  $("stop").disabled = false;
  let id = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      signal: asking.signal,
      body: JSON.stringify({
        model: $("model").value,
        messages: [{ role: "user", content: $("prompt").value }],
        max_tokens: Number($("tokens").value),
        stream: true,
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      id = chunk.id;
      answer.append(chunk.choices[0]?.delta?.content ?? "");
      answer.scrollTop = answer.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.className = "failed";
      answer.append(String(error.message ?? error));
    }
  }
  asking = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  if (id) $("cost").textContent = await cost(id).catch(() => "");
  poll();
}

// ---- start ---------------------------------------------------------------------------------

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
}

const kept = localStorage.getItem("theme") ?? "";
theme(kept);
$("theme").value = kept;
$("theme").addEventListener("change", ({ target }) => {
  localStorage.setItem("theme", target.value);
  theme(target.value);
});
$("ask").addEventListener("submit", ask);
$("stop").addEventListener("click", () => asking?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") asking?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && document.activeElement === $("prompt")) $("ask").requestSubmit();
});
document.addEventListener("visibilitychange", poll);
follow();
