// Draw what /state.json says, once a second while somebody looks. Nothing is sent but the key, in a header.
"use strict";

const EVERY_MS = 1000, SILENT_S = 15, KEY = "prts-api-key";
const at = (id) => document.getElementById(id);
const cards = new Map();
let seen = 0; // when the server was last heard of

function made(name, kind, text) {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

function drawn(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const hue = (i, of) => `hsl(${Math.round(210 + (360 * i) / Math.max(of, 1)) % 360} 48% 52%)`;
const clock = (s) => new Date(s * 1000).toLocaleTimeString([], { hour12: false });
const ms = (x) => (x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2)) + " ms";

function lasted(s) {
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} days`;
}

// ---- charts, in a box of 100 by 100 --------------------------------------------------------------------------------
function line(points, low, high, width) {
  const y = (v) => 96 - (92 * (v - low)) / (high - low || 1);
  return points.map(([x, v], i) => `${i ? "L" : "M"}${((100 * x) / (width || 1)).toFixed(2)} ${y(v).toFixed(2)}`).join("");
}

function valueChart(session) {
  const box = drawn("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" });
  const values = session.values, first = values[0][0], span = values.at(-1)[0] - first;
  const all = values.map((v) => v[1]), low = Math.min(...all), high = Math.max(...all);
  box.setAttribute("aria-label", `value from ${all[0]} to ${all.at(-1)}`);
  for (const y of [4, 96]) box.append(drawn("line", { class: "grid", x1: 0, x2: 100, y1: y, y2: y }));
  box.append(drawn("path", { class: "value", d: line(values.map(([t, v]) => [t - first, v]), low, high, span) }));
  return [box, `${low.toFixed(2)} to ${high.toFixed(2)} nats in ${lasted(span)}`, all.at(-1).toFixed(2)];
}

function chunkChart(session) {
  const box = drawn("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", class: "chunk", role: "img" });
  const past = session.executed, rows = past.concat(session.chunk), width = rows.length - 1;
  const now = (100 * past.length) / (width || 1);
  box.setAttribute("aria-label", "executed rows, then the last chunk");
  box.append(drawn("rect", { x: 0, y: 0, width: Math.min(now, 100), height: 100 }));
  session.chunk[0].forEach((_, dim) => {
    const points = rows.map((row, x) => [x, row[dim]]), all = points.map((p) => p[1]);
    const path = drawn("path", { class: "row", d: line(points, Math.min(...all), Math.max(...all), width) });
    path.style.stroke = hue(dim, session.chunk[0].length);
    box.append(path);
  });
  box.append(drawn("line", { class: "now", x1: now, x2: now, y1: 0, y2: 100 }));
  return box;
}

// ---- sessions ------------------------------------------------------------------------------------------------------
function card(name) {
  const root = made("article", "session"), top = made("div", "top"), parts = { root, pictures: new Map() };
  top.append((parts.name = made("b", "", name)), (parts.state = made("span", "state")));
  root.append(top, (parts.words = made("p", "words")), (parts.cameras = made("div", "cameras")));
  root.append((parts.value = made("div")), (parts.chunk = made("div")), (parts.legend = made("div", "legend")));
  at("sessions").append(root);
  return parts;
}

function label(left, right) {
  const node = made("div", "label");
  node.append(made("span", "", left), made("span", "", right));
  return node;
}

function shortened(name) {
  return name.length > 26 ? `${name.slice(0, 14)}…${name.slice(-8)}` : name;
}

function show(session, state) {
  const id = `${session.name} ${session.began}`, parts = cards.get(id) || card(id);
  cards.set(id, parts);
  const silent = state.now - session.heard > SILENT_S;
  const worry = { unsure: "unsure · ", failing: "failing · " }[session.alarm] || "";
  parts.root.classList.toggle("alarm", session.alarm === "failing");
  parts.root.classList.toggle("unsure", session.alarm === "unsure");
  parts.root.classList.toggle("silent", silent);
  parts.name.textContent = session.who || shortened(session.name);
  parts.name.title = session.name;
  const said = silent ? `silent for ${lasted(state.now - session.heard)}` : session.looks === 1 ? "1 look" : `${session.looks} looks`;
  parts.state.textContent = worry + `version ${session.version || "–"} · ${said}`;
  parts.words.replaceChildren(session.prompt, ...(session.subtask ? [made("i", "", ` · ${session.subtask}`)] : []));
  parts.words.title = session.prompt;
  for (const [key, source] of Object.entries(session.pictures)) {
    if (!parts.pictures.has(key)) {
      const figure = made("figure"), picture = made("img");
      picture.alt = `last picture of ${state.cameras[key]}`;
      figure.append(picture, made("figcaption", "", state.cameras[key]));
      parts.cameras.append(figure);
      parts.pictures.set(key, picture);
    }
    parts.pictures.get(key).src = source;
  }
  if (session.values.length > 1) {
    const [box, range, last] = valueChart(session);
    parts.value.replaceChildren(label(`value ${last}`, range), box);
  } else parts.value.replaceChildren();
  if (session.chunk.length && session.chunk[0].length) {
    const past = session.executed.length;
    const step = session.step === null ? "" : `, at step ${session.step}`;
    const how = !past ? `asked first${step}` : session.step === null ? "first rows of chunks" : `executed${step}`;
    const held = session.held ? `, ${session.held} held` : "";
    parts.chunk.replaceChildren(label(how, `last chunk, ${session.chunk.length} rows${held}`), chunkChart(session));
    if (!parts.legend.childElementCount) {
      state.action.forEach((name, i) => {
        const entry = made("span", "", name);
        entry.style.setProperty("--hue", hue(i, state.action.length));
        parts.legend.append(entry);
      });
    }
  }
  return id;
}

// ---- the page ------------------------------------------------------------------------------------------------------
function row(...cells) {
  const node = made("tr");
  for (const [kind, content] of cells) {
    const cell = made("td", kind);
    cell.append(content);
    if (kind === "text") cell.title = content;
    node.append(cell);
  }
  return node;
}

function bar(part) {
  const node = made("div", "bar");
  node.style.width = `${100 * part}%`;
  return node;
}

function draw(state) {
  at("model").textContent = state.model || "prts serve";
  document.title = `${state.model || "prts serve"}${state.unwell ? " (unwell)" : ""}`;
  at("about").textContent = `${state.embodiment}, ${state.control_hz} Hz · ${state.protocols.join(" and ")} · ${state.server}`;
  at("health").textContent = state.unwell || "ready";
  at("health").className = state.unwell ? "bad" : "";
  const all = state.latency.find((one) => one.phase === "all");
  const figures = [
    [`${state.clients} of ${state.max_clients}`, "clients"],
    [state.open_sessions, "sessions"],
    [state.under_way, "requests under way"],
    [`${(state.queued_bytes / 2 ** 20).toFixed(1)} MiB`, "of requests"],
    [all ? ms(all.p50_ms) : "–", "median answer"],
    [lasted(state.now - state.began), "up"],
  ];
  if (state.recording) figures.push([state.recording === "on" ? "on" : "stopped", "recording"]);
  at("figures").replaceChildren(...figures.map(([number, what]) => {
    const node = made("div", "figure");
    node.append(made("b", "", number), made("span", "", what));
    if (what === "recording") node.title = state.recording;
    return node;
  }));
  at("none").hidden = state.sessions.length > 0;
  const there = new Set(state.sessions.map((session) => show(session, state)));
  for (const [id, parts] of cards) if (!there.has(id)) { parts.root.remove(); cards.delete(id); }
  const longest = Math.max(...state.latency.map((one) => one.p95_ms), 1e-9);
  at("latency").replaceChildren(...state.latency.map((one) =>
    row(["", one.phase], ["bars", bar(one.p50_ms / longest)], ["", ms(one.p50_ms)], ["", ms(one.p95_ms)])));
  at("budget").textContent = state.budget_ms ? `The package's budget is ${ms(state.budget_ms)} a chunk.` : "";
  at("versions").replaceChildren(...state.versions.map((one) => {
    const share = one.share === null ? "" : ` for ${Math.round(100 * one.share)} %`;
    return row(["", one.name || "–"], ["", one.role + share], ["", String(one.sessions)], ["text", one.digest || "–"]);
  }));
  at("fine").hidden = state.errors.length > 0;
  at("errors").replaceChildren(...state.errors.map((error) => {
    const node = made("li");
    const who = made("span", "", error.who);
    who.title = error.who;
    node.append(made("time", "", clock(error.at)), who, made("q", "", error.what));
    return node;
  }));
}

async function look() {
  const key = sessionStorage.getItem(KEY);
  try {
    const reply = await fetch("state.json", key ? { headers: { Authorization: `Api-Key ${key}` } } : {});
    if (reply.status === 401) {
      at("wrong").textContent = key ? "That is not a key of this server." : "";
      sessionStorage.removeItem(KEY);
      at("ask").hidden = false;
      at("all").hidden = true;
      return false;
    }
    if (!reply.ok) throw new Error(await reply.text());
    draw(await reply.json());
    seen = Date.now();
    at("ask").hidden = true;
    at("all").hidden = false;
  } catch (error) {
    const since = seen ? ` since ${clock(seen / 1000)}` : "";
    at("health").textContent = `no answer${since}: ${error.message}`;
    at("health").className = "bad";
  }
  return true;
}

async function go() {
  if (document.hidden || (await look())) setTimeout(go, EVERY_MS);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value);
  at("key").value = "";
  go();
});
go();
