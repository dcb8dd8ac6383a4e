"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const tables = {};
for (const [name, { shape, data: text }] of Object.entries(data.tables)) {
  const values = new Float32Array(bytesOf(text).buffer);
  tables[name] = { shape, values };
}
// Value of a table at an index, such as at("byClass", c, l, e).
function at(name, ...index) {
  const { shape, values } = tables[name];
  return values[index.reduce((place, i, axis) => place * shape[axis] + i, 0)];
}
const L = data.layers.length, E = data.experts, C = data.classes.length, S = data.steps;
const range = (n) => Array.from({ length: n }, (_, i) => i);
const sum = (values) => values.reduce((a, b) => a + b, 0);
const nameOf = (l) => data.numbers[l]; // number of a layer's block
const state = { layer: 0, expert: 0 };

// Sums over classes or steps: load of an expert, and all assignments of a row.
const load = range(L).map((l) => range(E).map((e) => sum(range(S).map((s) => at("byStep", s, l, e)))));
const whole = load.map(sum);
const shareOf = (name, row, l, e) => {
  const all = sum(range(E).map((i) => at(name, row, l, i)));
  return all ? at(name, row, l, e) / all : NaN;
};
const rowShares = (name, row, l) => {
  const counts = range(E).map((i) => at(name, row, l, i)), all = sum(counts);
  return counts.map((n) => (all ? n / all : NaN));
};

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
let colours;
function readColours() {
  colours = {};
  for (const name of ["low", "mid", "high"]) colours[name] = rgb(style(`--${name}`));
}
// Colour of x: -1 is low, 0 is the middle, 1 is high.
function colour(x) {
  if (Number.isNaN(x)) return colours.mid.map((c) => c);
  const end = x < 0 ? colours.low : colours.high, part = Math.min(1, Math.abs(x)) ** 0.85;
  return colours.mid.map((c, i) => Math.round(c + part * (end[i] - c)));
}
const css = (x) => `rgb(${colour(x)})`;
// Scales: `ratio` compares with 1 and is logarithmic, `signed` is linear, `share` starts at 0.
const SCALES = {
  ratio: (most) => ({ x: (v) => Math.log2(Math.max(v, 1e-6)) / Math.log2(most),
    ends: [`÷ ${number(most)}`, "1", `× ${number(most)}`] }),
  signed: (most) => ({ x: (v) => v / most, ends: [number(-most), "0", number(most)] }),
  share: (most, least = 0) => ({ x: (v) => (v - least) / (most - least || 1),
    ends: [number(least), number(most)] }),
};
function number(x) {
  if (!Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  return size >= 100 ? x.toFixed(0) : size >= 1 || size === 0 ? String(+x.toPrecision(3)) : String(+x.toPrecision(2));
}
// Largest ratio of a ratio scale: 98 of 100 values are inside.
function reach(values) {
  const logs = values.filter((v) => v > 0).map((v) => Math.abs(Math.log2(v))).sort((a, b) => a - b);
  return 2 ** Math.min(3, Math.max(0.5, logs[Math.floor(0.98 * (logs.length - 1))] || 1));
}
function scaleBar(element, scale, words) {
  const stops = scale.ends.length === 3 ? [-1, -0.5, 0, 0.5, 1] : [0, 0.5, 1];
  const bar = document.createElement("div");
  bar.className = "scale";
  const [first, ...rest] = scale.ends;
  bar.innerHTML = `<span>${first}</span><i style="background:linear-gradient(90deg,${stops.map(css)})"></i><span>${rest[rest.length - 1]}</span><span></span>`;
  bar.lastChild.textContent = words;
  element.append(bar);
}

const tip = $("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.style.display = text ? "block" : "none";
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
  tip.style.left = `${Math.max(4, x)}px`;
  const below = event.clientY + 18;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below}px`;
}

// A matrix of cells with labels. o: rows, columns (labels), value(r, c), scale, words, say(r, c),
// pick(r, c), marked(r, c), down, across (names of the axes)
function matrix(element, o) {
  element.textContent = "";
  element.className = o.pick ? "pick" : "";
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  const font = "11px system-ui, sans-serif", width = element.clientWidth || 300;
  pen.font = font;
  const texts = o.rows.map((name) => fit(pen, String(name), width * 0.32));
  const left = 8 + (o.down ? 14 : 0) + Math.max(...texts.map((t) => pen.measureText(t).width));
  const columns = o.columns.length, rows = o.rows.length;
  const w = Math.min(o.cell || 46, (width - left - 2) / columns);
  const h = rows > 200 ? Math.max(1, 900 / rows) : rows > 45 ? Math.max(8, Math.min(14, 980 / rows)) : Math.max(14, Math.min(22, w));
  const top = 18 + (o.across ? 14 : 0), high = top + rows * h + 2, ratio = devicePixelRatio || 1;
  canvas.width = width * ratio; canvas.height = high * ratio;
  canvas.style.width = `${width}px`; canvas.style.height = `${high}px`;
  pen.scale(ratio, ratio);
  pen.font = font;
  pen.textBaseline = "middle";
  const gap = Math.min(w, h) > 7 ? 1 : 0;
  range(rows).forEach((r) => range(columns).forEach((c) => {
    pen.fillStyle = css(o.scale.x(o.value(r, c)));
    pen.fillRect(left + c * w, top + r * h, Math.ceil(w) - gap, Math.ceil(h) - gap);
  }));
  pen.strokeStyle = style("--pick"); pen.lineWidth = 2;
  if (o.marked) range(rows).forEach((r) => range(columns).forEach((c) => {
    if (o.marked(r, c)) pen.strokeRect(left + c * w, top + r * h, Math.max(3, w - gap), h - gap);
  }));
  pen.fillStyle = style("--soft");
  pen.textAlign = "right";
  const everyRow = Math.ceil(12 / h);
  for (let r = 0; r < rows; r += everyRow) pen.fillText(texts[r], left - 5, top + (r + 0.5) * h);
  pen.textAlign = "center";
  const widest = Math.max(...o.columns.map((name) => pen.measureText(String(name)).width)) + 6;
  const everyColumn = Math.ceil(widest / w);
  for (let c = 0; c < columns; c += everyColumn) pen.fillText(o.columns[c], left + (c + 0.5) * w, top - 9);
  if (o.across) { pen.textAlign = "left"; pen.fillText(o.across, left, 6); }
  if (o.down) { pen.save(); pen.translate(7, top + (rows * h) / 2); pen.rotate(-Math.PI / 2); pen.textAlign = "center"; pen.fillText(fit(pen, o.down, rows * h), 0, 0); pen.restore(); }
  const cell = (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - left) / w), r = Math.floor((event.clientY - box.top - top) / h);
    return r >= 0 && r < rows && c >= 0 && c < columns ? [r, c] : null;
  };
  canvas.onmousemove = (event) => { const found = cell(event); showTip(event, found ? o.say(...found) : ""); };
  canvas.onmouseleave = (event) => showTip(event, "");
  canvas.onclick = (event) => { const found = cell(event); if (found && o.pick) o.pick(...found); };
  element.append(canvas);
  scaleBar(element, o.scale, o.words);
  const thin = [];
  if (everyRow > 1) thin.push(`one of ${everyRow} row labels`);
  if (everyColumn > 1) thin.push(`one of ${everyColumn} column labels`);
  if (thin.length) element.lastChild.lastChild.textContent += `; shown: ${thin.join(" and ")}, point at a cell for its own`;
}
function fit(pen, text, room) {
  if (pen.measureText(text).width <= room) return text;
  let n = text.length;
  while (n > 1 && pen.measureText(text.slice(0, n) + "…").width > room) n--;
  return text.slice(0, n) + "…";
}
// A small map of the image. value(t): value at a place
function map(value, scale) {
  const [rows, columns] = data.grid, canvas = document.createElement("canvas");
  canvas.width = columns; canvas.height = rows;
  const image = new ImageData(columns, rows);
  range(rows * columns).forEach((t) => image.data.set([...colour(scale.x(value(t))), 255], 4 * t));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
function maps(element, captions, value, scale, pick) {
  element.textContent = "";
  captions.forEach((caption, i) => {
    const figure = document.createElement("figure"), words = document.createElement("figcaption");
    words.textContent = caption;
    figure.append(map((t) => value(i, t), scale), words);
    if (pick) { figure.onclick = () => pick(i); figure.style.cursor = "pointer"; }
    if (pick && i === state.expert) figure.className = "chosen";
    element.append(figure);
  });
}
function showScale(id, scale, words) { $(id).textContent = ""; scaleBar($(id), scale, words); }

const allCrops = bytesOf(data.crops), urls = {};
function urlOf(crop) {
  const from = crop ? data.cropEnds[crop - 1] : 0;
  return (urls[crop] ||= URL.createObjectURL(new Blob([allCrops.subarray(from, data.cropEnds[crop])], { type: "image/webp" })));
}
function bars(element, rows, words) {
  element.textContent = "";
  const most = Math.max(...rows.map(([, v]) => Math.abs(Math.log2(Math.max(v, 1e-3)))), 0.5);
  for (const [name, value] of rows) {
    const row = document.createElement("div");
    if (name === null) { row.className = "gap"; row.textContent = "…"; element.append(row); continue; }
    row.className = "bar";
    const log = Math.log2(Math.max(value, 1e-3));
    row.innerHTML = `<span></span><b class="${log < 0 ? "less" : ""}" style="width:${(100 * Math.abs(log)) / most}%"></b><span>× ${number(value)}</span>`;
    row.firstChild.textContent = name; row.firstChild.title = name;
    element.append(row);
  }
  if (!rows.length) element.textContent = words;
}

function choose(layer, expert, scroll) {
  state.layer = layer; state.expert = expert;
  history.replaceState(null, "", `#layer-${nameOf(layer)}-expert-${expert}`);
  drawAll();
  if (scroll) $("one").scrollIntoView({ behavior: "smooth" });
}
const jump = (l, e) => choose(l, e, true);

function drawLoad() {
  const values = (l, e) => (load[l][e] / whole[l]) * E;
  const scale = SCALES.ratio(reach(range(L).flatMap((l) => range(E).map((e) => values(l, e)))));
  matrix($("load"), {
    rows: range(L).map(nameOf), columns: range(E), value: values, scale, down: "layer", across: "expert",
    words: "share of the layer's assignments, relative to an equal share", pick: jump,
    say: (l, e) => `layer ${nameOf(l)} (${data.layers[l]}), expert ${e}: ${number(100 * load[l][e] / whole[l])} % of the assignments, mean weight ${number(at("weight", l, e))}`,
    marked: (l, e) => l === state.layer && e === state.expert,
  });
  const dead = range(L).flatMap((l) => range(E).filter((e) => values(l, e) < 0.01).map((e) => `${nameOf(l)}·${e}`));
  $("dead").textContent = dead.length ? `Dead (layer·expert): ${dead.slice(0, 40).join(", ")}${dead.length > 40 ? ` and ${dead.length - 40} more` : ""}.` : "No expert is dead.";
}
function drawNumbers() {
  const names = Object.keys(data.statistics);
  const cells = (l) => names.map((n) => `<td>${data.statistics[n][l] ?? "–"}</td>`).join("");
  $("numbers").innerHTML = `<table><tr><th>layer</th>${names.map((n) => `<th>${n}</th>`).join("")}</tr>${range(L).map((l) => `<tr><td>${nameOf(l)}</td>${cells(l)}</tr>`).join("")}</table>`;
}
function drawExpert() {
  const { layer: l, expert: e } = state, share = load[l][e] / whole[l];
  document.querySelector("#one .name").textContent = `${e} of layer ${nameOf(l)}`;
  const facts = [`${data.layers[l]}: ${number(100 * share)} % of the assignments (an equal share is ${number(100 / E)} %), mean weight ${number(at("weight", l, e))}.`];
  if (tables.damage && !Number.isNaN(at("damage", 0, l, e))) {
    const all = range(L).flatMap((i) => range(E).map((j) => at("damage", 0, i, j))).filter((v) => !Number.isNaN(v));
    const rank = 1 + all.filter((v) => v > at("damage", 0, l, e)).length;
    facts.push(`Without it, pixels change by ${number(100 * at("damage", 0, l, e))} % of their range (rank ${rank} of ${all.length}).`);
    const loss = at("damage", 1, l, e);
    if (!Number.isNaN(loss)) facts.push(`The held-out loss changes by ${number(loss)} ± ${number(at("damage", 2, l, e))}.`);
  }
  $("facts").textContent = facts.join(" ");
  const gallery = $("gallery");
  gallery.textContent = "";
  for (const [crop, weight, image, label, frame] of data.gallery[l][e]) {
    const figure = document.createElement("figure");
    figure.innerHTML = `<div class="crop"><img alt="" loading="lazy"></div><figcaption></figcaption>`;
    const img = figure.querySelector("img");
    img.onload = () => { img.parentNode.classList.toggle("pixels", img.naturalWidth < 48); img.style.setProperty("--aspect", img.naturalWidth / img.naturalHeight); };
    img.parentNode.style.setProperty("--inset", frame.map((x) => `${x}%`).join(" "));
    img.src = urlOf(crop);
    const words = `${data.classes[label]}, image ${image}, weight ${number(weight)}`;
    img.alt = figure.title = words;
    figure.querySelector("figcaption").textContent = data.classes[label];
    gallery.append(figure);
  }
  if (!data.gallery[l][e].length) gallery.textContent = "No patch chose this expert.";
  const ratios = range(C).map((c) => [data.classes[c], share ? shareOf("byClass", c, l, e) / share : NaN]).filter(([, v]) => v > 0);
  ratios.sort((a, b) => b[1] - a[1]);
  bars($("classes"), ratios.length > 13 ? [...ratios.slice(0, 9), [null, 1], ...ratios.slice(-3)] : ratios, "none");
  drawTime(l, e);
  const all = (t) => sum(range(E).map((i) => at("byPlace", t, l, i)));
  const ratio = (t) => (all(t) ? (at("byPlace", t, l, e) / all(t)) * E : NaN);
  const scale = SCALES.ratio(reach(range(data.grid[0] * data.grid[1]).map(ratio)));
  $("place").textContent = "";
  $("place").append(map(ratio, scale));
  scaleBar($("place"), scale, "an equal share is 1");
  drawFriends(l, e);
}
function drawTime(l, e) {
  const ratio = range(S).map((s) => shareOf("byStep", s, l, e) * E), most = Math.max(1.5, ...ratio.filter(Number.isFinite));
  const [w, h, left] = [260, 96, 30], x = (s) => left + ((s + 0.5) * (w - left)) / S, y = (v) => h - 6 - (v / most) * (h - 16);
  const points = ratio.map((v, s) => (Number.isFinite(v) ? `${x(s)},${y(v)}` : "")).join(" ");
  const dots = S <= 40 ? ratio.map((v, s) => `<circle cx="${x(s)}" cy="${y(v || 0)}" r="2.5" fill="var(--high)"><title>t = ${data.times[s]}: × ${number(v)}</title></circle>`).join("") : "";
  $("time").innerHTML = `<svg viewBox="0 0 ${w} ${h + 14}" width="100%" style="max-width:24rem" role="img" aria-label="share by step">
    <line x1="${left}" x2="${w}" y1="${y(1)}" y2="${y(1)}" stroke="var(--soft)" stroke-dasharray="3 3"/>
    <text x="${left - 4}" y="${y(1) + 4}" text-anchor="end">1</text><text x="${left - 4}" y="${y(most) + 8}" text-anchor="end">${number(most)}</text>
    <polyline points="${points}" fill="none" stroke="var(--high)" stroke-width="2"/>${dots}
    <text x="${left}" y="${h + 11}">t = ${data.times[0]}</text><text x="${w}" y="${h + 11}" text-anchor="end">${data.times[S - 1]}</text></svg>`;
}
function drawFriends(l, e) {
  const rows = [], link = (layer, expert, words) => rows.push([layer, expert, words]);
  const top = (values) => range(E).filter((i) => Number.isFinite(values[i])).sort((a, b) => values[b] - values[a]).slice(0, 3);
  if (l + 1 < L) { const lift = lifts(l)[e]; for (const f of top(lift)) link(l + 1, f, `× ${number(lift[f])} in the next layer`); }
  if (l > 0) { const lift = lifts(l - 1).map((row) => row[e]); for (const f of top(lift)) link(l - 1, f, `× ${number(lift[f])} in the layer before`); }
  const similar = range(E).map((f) => (f === e ? NaN : at("similarity", l, e, f)));
  for (const f of top(similar).slice(0, 1)) link(l, f, `most similar weights, cosine ${number(similar[f])}`);
  $("friends").textContent = "";
  for (const [layer, expert, words] of rows) {
    const line = document.createElement("div"), a = document.createElement("a");
    a.href = `#layer-${nameOf(layer)}-expert-${expert}`;
    a.textContent = `layer ${nameOf(layer)}, expert ${expert}`;
    a.onclick = (event) => { event.preventDefault(); jump(layer, expert); };
    line.append(a, `: ${words}`);
    $("friends").append(line);
  }
}
const lifts = ((known) => (l) => (known[l] ||= (() => {
  const pairs = range(E).map((e) => range(E).map((f) => at("together", l, e, f)));
  const rows = pairs.map(sum), columns = range(E).map((f) => sum(pairs.map((row) => row[f]))), all = sum(rows);
  return pairs.map((row, e) => row.map((n, f) => (rows[e] * columns[f] ? (n * all) / (rows[e] * columns[f]) : NaN)));
})()))({});

function drawClasses() {
  const l = state.layer, shares = data.order.map((c) => rowShares("byClass", c, l).map((v) => v * E));
  const scale = SCALES.ratio(reach(shares.flat()));
  matrix($("byClass"), {
    rows: data.order.map((c) => data.classes[c]), columns: range(E), value: (r, c) => shares[r][c], scale,
    across: "expert", words: "relative to an equal share", pick: (r, e) => jump(l, e),
    say: (r, e) => `${data.classes[data.order[r]]}, expert ${e}: × ${number(shares[r][e])}`,
    marked: E <= 24 ? (r, e) => r === 0 && e === state.expert && C === 1 : null,
  });
}
function drawSteps() {
  const l = state.layer, shares = range(S).map((s) => rowShares("byStep", s, l).map((v) => v * E));
  matrix($("byStep"), {
    rows: range(E), columns: data.times, value: (e, s) => shares[s][e], scale: SCALES.ratio(reach(shares.flat())),
    down: "expert", across: "t", words: "relative to an equal share", pick: (e) => jump(l, e),
    say: (e, s) => `expert ${e}, t = ${data.times[s]}: × ${number(shares[s][e])}`,
    marked: (e, s) => false,
  });
}
function drawPlaces() {
  const l = state.layer, T = data.grid[0] * data.grid[1];
  const shares = range(T).map((t) => rowShares("byPlace", t, l).map((v) => v * E));
  const scale = SCALES.ratio(reach(shares.flat()));
  maps($("byPlace"), range(E).map((e) => (E > 16 ? String(e) : `expert ${e}`)), (e, t) => shares[t][e], scale, (e) => jump(l, e));
  showScale("placeScale", scale, "relative to an equal share");
}
function drawSpent() {
  $("spentSection").hidden = !tables.spent.shape[1];
  if ($("spentSection").hidden) return;
  const l = state.layer, T = data.grid[0] * data.grid[1];
  const steps = [...new Set(range(10).map((i) => Math.round((i * (S - 1)) / 9)))];
  const values = steps.flatMap((s) => range(T).map((t) => at("spent", t, s, l)));
  const scale = SCALES.share(Math.max(...values), Math.min(...values));
  maps($("spent"), steps.map((s) => `t = ${data.times[s]}`), (i, t) => at("spent", t, steps[i], l), scale);
  showScale("spentScale", scale, "experts per patch");
}
function drawOther() {
  const l = state.layer, text = range(E).map((e) => sum(range(S).map((s) => at("other", s, l, e))));
  const all = sum(text);
  $("otherSection").hidden = !all;
  if (!all) return;
  const shares = [load[l].map((n) => (n / whole[l]) * E), text.map((n) => (n / all) * E)];
  matrix($("other"), {
    rows: ["image", "text"], columns: range(E), value: (r, e) => shares[r][e], scale: SCALES.ratio(reach(shares.flat())),
    across: "expert", words: "relative to an equal share", pick: (r, e) => jump(l, e),
    say: (r, e) => `${r ? "text" : "image"}, expert ${e}: × ${number(shares[r][e])}`,
  });
}
function drawFlow() {
  const l = state.layer;
  $("flowSection").hidden = l + 1 >= L;
  if (l + 1 >= L) return;
  const lift = lifts(l);
  matrix($("flow"), {
    rows: range(E), columns: range(E), value: (e, f) => lift[e][f], scale: SCALES.ratio(reach(lift.flat())),
    down: `expert of layer ${nameOf(l)}`, across: `expert of layer ${nameOf(l + 1)}`, words: "relative to chance",
    say: (e, f) => `expert ${e}, then expert ${f}: × ${number(lift[e][f])}`, pick: (e, f) => jump(l + 1, f),
    marked: (e, f) => false,
  });
}
function drawKept() {
  const values = range(S - 1).flatMap((s) => range(L).map((l) => at("kept", s, l))).filter(Number.isFinite);
  const perPatch = sum(range(L).map((l) => at("perImage", l))) / L / S;
  const T = tables.byPlace.shape[0];
  $("chance").textContent = number(perPatch / data.patches / E);
  if (!values.length) { $("kept").textContent = "A single step has no next one."; $("keptWhere").textContent = $("keptScale").textContent = ""; return; }
  const scale = SCALES.share(Math.max(...values), Math.min(...values));
  matrix($("kept"), {
    rows: range(L).map(nameOf), columns: data.times.slice(0, -1), value: (l, s) => at("kept", s, l), scale,
    down: "layer", across: "t of the step", words: "share of experts kept", pick: (l) => choose(l, state.expert),
    say: (l, s) => `layer ${nameOf(l)}, t = ${data.times[s]} to ${data.times[s + 1]}: ${number(100 * at("kept", s, l))} % kept`,
    marked: (l, s) => false,
  });
  const where = range(T).map((t) => at("keptWhere", t, state.layer)), seen = where.filter(Number.isFinite);
  const places = SCALES.share(Math.max(...seen), Math.min(...seen));
  maps($("keptWhere"), [`layer ${nameOf(state.layer)}`], (_, t) => where[t], places);
  showScale("keptScale", places, "share of experts kept, mean over the steps");
}
function drawSimilarity() {
  const l = state.layer, off = range(E).flatMap((e) => range(E).filter((f) => f !== e).map((f) => Math.abs(at("similarity", l, e, f))));
  const scale = SCALES.signed(Math.max(0.01, ...off));
  matrix($("similarity"), {
    rows: range(E), columns: range(E), value: (e, f) => (e === f ? NaN : at("similarity", l, e, f)), scale,
    down: "expert", across: "expert", words: "cosine", pick: (e, f) => jump(l, f),
    say: (e, f) => `experts ${e} and ${f}: ${number(at("similarity", l, e, f))}`, marked: (e, f) => false,
  });
}
function drawDamage() {
  $("damageSection").hidden = !tables.damage;
  if (!tables.damage) return;
  const one = (id, k, scaleOf, words, text) => {
    const values = range(L).flatMap((l) => range(E).map((e) => at("damage", k, l, e))).filter(Number.isFinite);
    if (!values.length) return false;
    matrix($(id), {
      rows: range(L).map(nameOf), columns: range(E), value: (l, e) => at("damage", k, l, e), scale: scaleOf(values),
      down: "layer", across: "expert", words, pick: jump, say: text,
      marked: (l, e) => l === state.layer && e === state.expert,
    });
    return true;
  };
  $("damageOf").textContent = "change of the pictures' pixels, root mean square in parts of their range";
  one("damage", 0, (v) => SCALES.share(Math.max(...v)), "change of pixels",
    (l, e) => `layer ${nameOf(l)}, expert ${e}: ${number(100 * at("damage", 0, l, e))} %`);
  const shown = one("loss", 1, (v) => SCALES.signed(Math.max(...v.map(Math.abs))), "change of the held-out loss; below 0 the model is better without the expert",
    (l, e) => `layer ${nameOf(l)}, expert ${e}: ${number(at("damage", 1, l, e))} ± ${number(at("damage", 2, l, e))}`);
  $("lossTitle").hidden = $("loss").hidden = !shown;
}
function drawAll() {
  readColours();
  $("layer").value = state.layer; $("expert").value = state.expert;
  $("chosen").textContent = data.layers[state.layer];
  document.querySelectorAll(".layer").forEach((element) => { element.textContent = nameOf(state.layer); });
  for (const draw of [drawLoad, drawNumbers, drawExpert, drawClasses, drawSteps, drawPlaces, drawSpent, drawOther, drawFlow, drawKept, drawSimilarity, drawDamage]) draw();
}

$("about").textContent = data.about;
$("enough").textContent = data.perClass < 20 ? `Only ${number(data.perClass)} images a class: small differences are chance.` : `${number(data.perClass)} images a class; draw others with another seed before you trust a small difference.`;
$("layer").append(...range(L).map((l) => new Option(nameOf(l), l)));
$("expert").append(...range(E).map((e) => new Option(e, e)));
$("layer").onchange = () => choose(+$("layer").value, state.expert);
$("expert").onchange = () => choose(state.layer, +$("expert").value);
const move = (by) => { const i = (state.layer * E + state.expert + by + L * E) % (L * E); choose(Math.floor(i / E), i % E); };
$("before").onclick = () => move(-1);
$("after").onclick = () => move(1);
addEventListener("keydown", (event) => {
  if (event.target.tagName === "SELECT") return;
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
function fromAddress() {
  const found = /^#layer-(\d+)-expert-(\d+)$/.exec(location.hash);
  const layer = found ? data.numbers.indexOf(+found[1]) : -1;
  if (layer >= 0 && +found[2] < E) [state.layer, state.expert] = [layer, +found[2]];
}
fromAddress();
document.body.className = E <= 16 ? "few" : "many"; // few experts leave room for two columns
let width = 0;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
width = innerWidth;
drawAll();
