"use strict";
const $ = (id) => document.getElementById(id);
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const range = (n) => Array.from({ length: n }, (_, i) => i);
const sum = (values) => values.reduce((a, b) => a + b, 0);

// The models of the page, one or more. A model has its data, what follows from them (E experts, S
// steps, C classes), the expert that is shown, and an element for each view.
const models = JSON.parse($("data").textContent).map((data) => {
  const model = { ...data, E: data.experts, S: data.steps, C: data.classes.length, places: data.grid[0] * data.grid[1], expert: 0, views: {}, urls: {} };
  model.tables = {};
  for (const [name, { shape, data: text }] of Object.entries(data.tables)) {
    model.tables[name] = { shape, values: new Float32Array(bytesOf(text).buffer) };
  }
  model.crops = bytesOf(data.crops);
  // Sums over the steps: load of an expert, and of all.
  model.load = data.layers.map((_, l) => range(model.E).map((e) => sum(range(model.S).map((s) => at(model, "byStep", s, l, e)))));
  model.whole = model.load.map(sum);
  return model;
});
const L = models[0].layers.length; // the same in all models
const nameOf = (l) => models[0].numbers[l]; // number of a layer's block
const state = { layer: 0 };
// Copies what one model shows for each model, under its title if there are several.
for (const one of document.querySelectorAll(".model")) {
  const all = document.createElement("div");
  all.className = "models";
  one.replaceWith(all);
  for (const model of models) {
    const copy = one.cloneNode(true);
    copy.querySelectorAll("[data-view]").forEach((view) => { model.views[view.dataset.view] = view; });
    if (models.length > 1) {
      const title = document.createElement("div");
      title.className = "title";
      title.textContent = model.title;
      copy.prepend(title);
    }
    all.append(copy);
  }
}

// Value of a table at an index, such as at(model, "byClass", c, l, e).
function at(model, name, ...index) {
  const { shape, values } = model.tables[name];
  return values[index.reduce((place, i, axis) => place * shape[axis] + i, 0)];
}
// The experts' shares of a row's assignments, relative to an equal share.
function ratios(model, name, row, l) {
  const counts = range(model.E).map((e) => at(model, name, row, l, e)), all = sum(counts);
  return counts.map((n) => (all ? (n / all) * model.E : NaN));
}
// Calls draw(model, values of the model, scale) for each model, with one scale for all of them.
function compare(valuesOf, scaleOf, draw) {
  const values = models.map(valuesOf);
  const scale = scaleOf(values.flat(Infinity).filter(Number.isFinite));
  models.forEach((model, i) => draw(model, values[i], scale));
}

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
const ratioScale = (values) => SCALES.ratio(reach(values));
const shareScale = (values) => SCALES.share(Math.max(...values), Math.min(...values));
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
  const w = Math.min(46, (width - left - 2) / columns);
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
// A small map of the image. values: of its places
function map([rows, columns], values, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = columns; canvas.height = rows;
  const image = new ImageData(columns, rows);
  values.forEach((value, t) => image.data.set([...colour(scale.x(value)), 255], 4 * t));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
// o: captions, grid, values (of each map), scale, pick(i), chosen (the marked map)
function maps(element, o) {
  element.textContent = "";
  o.captions.forEach((caption, i) => {
    const figure = document.createElement("figure"), words = document.createElement("figcaption");
    words.textContent = caption;
    figure.append(map(o.grid, o.values[i], o.scale), words);
    if (o.pick) { figure.onclick = () => o.pick(i); figure.style.cursor = "pointer"; }
    if (i === o.chosen) figure.className = "chosen";
    element.append(figure);
  });
}
function showScale(element, scale, words) { element.textContent = ""; scaleBar(element, scale, words); }

function urlOf(model, crop) {
  const from = crop ? model.cropEnds[crop - 1] : 0;
  return (model.urls[crop] ||= URL.createObjectURL(new Blob([model.crops.subarray(from, model.cropEnds[crop])], { type: "image/webp" })));
}
// Bars from 0 to `most`, with a line at 1. rows: [name, value], or [null] where rows are left out
function bars(element, rows, most) {
  element.textContent = rows.length ? "" : "none";
  element.style.setProperty("--one", `${100 / most}%`);
  for (const [name, value] of rows) {
    const row = document.createElement("div");
    element.append(row);
    if (name === null) { row.className = "gap"; row.textContent = "…"; continue; }
    row.className = "bar";
    row.innerHTML = `<span></span><i><b class="${value < 1 ? "less" : ""}" style="width:${(100 * value) / most}%"></b></i><span>× ${number(value)}</span>`;
    row.firstChild.textContent = name; row.firstChild.title = name;
  }
}

const address = (layer, experts) => `#layer-${nameOf(layer)}${experts.map((e) => `-expert-${e}`).join("")}`;
function choose(layer, model, expert, scroll) {
  state.layer = layer; model.expert = expert;
  history.replaceState(null, "", address(layer, models.map((one) => one.expert)));
  drawAll();
  if (scroll) $("one").scrollIntoView({ behavior: "smooth" });
}
const jump = (l, model, e) => choose(l, model, e, true);

function drawLoad() {
  compare((m) => range(L).map((l) => m.load[l].map((n) => (n / m.whole[l]) * m.E)), ratioScale, (m, values, scale) => {
    matrix(m.views.load, {
      rows: range(L).map(nameOf), columns: range(m.E), value: (l, e) => values[l][e], scale, down: "layer", across: "expert",
      words: "share of the layer's assignments, relative to an equal share", pick: (l, e) => jump(l, m, e),
      say: (l, e) => `layer ${nameOf(l)} (${m.layers[l]}), expert ${e}: ${number(100 * m.load[l][e] / m.whole[l])} % of the assignments, mean weight ${number(at(m, "weight", l, e))}`,
      marked: (l, e) => l === state.layer && e === m.expert,
    });
    const dead = range(L).flatMap((l) => range(m.E).filter((e) => values[l][e] < 0.01).map((e) => `${nameOf(l)}·${e}`));
    m.views.dead.textContent = dead.length ? `Dead (layer·expert): ${dead.slice(0, 40).join(", ")}${dead.length > 40 ? ` and ${dead.length - 40} more` : ""}.` : "No expert is dead.";
  });
}
function drawNumbers(m) {
  const names = Object.keys(m.statistics);
  const cells = (l) => names.map((n) => `<td>${m.statistics[n][l]?.toFixed(3) ?? "–"}</td>`).join("");
  m.views.numbers.innerHTML = `<table><tr><th>layer</th>${names.map((n) => `<th>${n}</th>`).join("")}</tr>${range(L).map((l) => `<tr><td>${nameOf(l)}</td>${cells(l)}</tr>`).join("")}</table>`;
}
function drawFacts(m) {
  const l = state.layer, e = m.expert, share = m.load[l][e] / m.whole[l];
  m.views.name.textContent = `${e} of layer ${nameOf(l)}`;
  const facts = [`${m.layers[l]}: ${number(100 * share)} % of the assignments (an equal share is ${number(100 / m.E)} %), mean weight ${number(at(m, "weight", l, e))}.`];
  if (m.tables.damage && !Number.isNaN(at(m, "damage", 0, l, e))) {
    const all = range(L).flatMap((i) => range(m.E).map((j) => at(m, "damage", 0, i, j))).filter((v) => !Number.isNaN(v));
    const rank = 1 + all.filter((v) => v > at(m, "damage", 0, l, e)).length;
    facts.push(`Without it, pixels change by ${number(100 * at(m, "damage", 0, l, e))} % of their range (rank ${rank} of ${all.length}).`);
    const loss = at(m, "damage", 1, l, e);
    if (!Number.isNaN(loss)) facts.push(`The held-out loss changes by ${number(loss)} ± ${number(at(m, "damage", 2, l, e))}.`);
  }
  m.views.facts.textContent = facts.join(" ");
}
function drawGallery(m) {
  const gallery = m.views.gallery, entries = m.gallery[state.layer][m.expert];
  gallery.textContent = entries.length ? "" : "No patch chose this expert.";
  for (const [crop, weight, image, label, frame] of entries) {
    const figure = document.createElement("figure");
    figure.innerHTML = `<div class="crop"><img alt="" loading="lazy"></div><figcaption></figcaption>`;
    const img = figure.querySelector("img");
    img.onload = () => { img.parentNode.classList.toggle("pixels", img.naturalWidth < 48); img.style.setProperty("--aspect", img.naturalWidth / img.naturalHeight); };
    img.parentNode.style.setProperty("--inset", frame.map((x) => `${x}%`).join(" "));
    img.src = urlOf(m, crop);
    img.alt = figure.title = `${m.classes[label]}, image ${image}, weight ${number(weight)}`;
    figure.querySelector("figcaption").textContent = m.classes[label];
    gallery.append(figure);
  }
}
function drawExpert() {
  const l = state.layer;
  models.forEach((m) => [drawFacts, drawGallery, drawFriends].forEach((draw) => draw(m)));
  const most = (values) => Math.max(1, ...values);
  compare((m) => {
    const share = m.load[l][m.expert] / m.whole[l];
    const known = range(m.C).map((c) => [m.classes[c], ratios(m, "byClass", c, l)[m.expert] / m.E / share]);
    const rows = known.filter(([, v]) => Number.isFinite(v)).sort((a, b) => b[1] - a[1]);
    return rows.length > 13 ? [...rows.slice(0, 9), [null], ...rows.slice(-3)] : rows;
  }, most, (m, rows, most) => bars(m.views.classes, rows, most));
  compare((m) => range(m.S).map((s) => ratios(m, "byStep", s, l)[m.expert]), (values) => Math.max(1.5, ...values), drawTime);
  compare((m) => range(m.places).map((t) => ratios(m, "byPlace", t, l)[m.expert]), ratioScale, (m, values, scale) => {
    m.views.place.textContent = "";
    m.views.place.append(map(m.grid, values, scale));
    scaleBar(m.views.place, scale, "an equal share is 1");
  });
}
function drawTime(m, values, most) {
  const [w, h, left] = [260, 96, 30], x = (s) => left + ((s + 0.5) * (w - left)) / m.S, y = (v) => h - 6 - (v / most) * (h - 16);
  const points = values.map((v, s) => (Number.isFinite(v) ? `${x(s)},${y(v)}` : "")).join(" ");
  const dots = m.S <= 40 ? values.map((v, s) => `<circle cx="${x(s)}" cy="${y(v || 0)}" r="2.5" fill="var(--high)"><title>t = ${m.times[s]}: × ${number(v)}</title></circle>`).join("") : "";
  m.views.time.innerHTML = `<svg viewBox="0 0 ${w} ${h + 14}" width="100%" style="max-width:24rem" role="img" aria-label="share by step">
    <line x1="${left}" x2="${w}" y1="${y(1)}" y2="${y(1)}" stroke="var(--soft)" stroke-dasharray="3 3"/>
    <text x="${left - 4}" y="${y(1) + 4}" text-anchor="end">1</text><text x="${left - 4}" y="${y(most) + 8}" text-anchor="end">${number(most)}</text>
    <polyline points="${points}" fill="none" stroke="var(--high)" stroke-width="2"/>${dots}
    <text x="${left}" y="${h + 11}">t = ${m.times[0]}</text><text x="${w}" y="${h + 11}" text-anchor="end">${m.times[m.S - 1]}</text></svg>`;
}
function drawFriends(m) {
  const l = state.layer, e = m.expert, rows = [];
  const top = (values) => range(m.E).filter((i) => Number.isFinite(values[i])).sort((a, b) => values[b] - values[a]).slice(0, 3);
  if (l + 1 < L) { const lift = lifts(m, l)[e]; for (const f of top(lift)) rows.push([l + 1, f, `× ${number(lift[f])} in the next layer`]); }
  if (l > 0) { const lift = lifts(m, l - 1).map((row) => row[e]); for (const f of top(lift)) rows.push([l - 1, f, `× ${number(lift[f])} in the layer before`]); }
  const similar = range(m.E).map((f) => (f === e ? NaN : at(m, "similarity", l, e, f)));
  for (const f of top(similar).slice(0, 1)) rows.push([l, f, `most similar weights, cosine ${number(similar[f])}`]);
  m.views.friends.textContent = "";
  for (const [layer, expert, words] of rows) {
    const line = document.createElement("div"), a = document.createElement("a");
    a.href = address(layer, models.map((one) => (one === m ? expert : one.expert)));
    a.textContent = `layer ${nameOf(layer)}, expert ${expert}`;
    a.onclick = (event) => { event.preventDefault(); jump(layer, m, expert); };
    line.append(a, `: ${words}`);
    m.views.friends.append(line);
  }
}
// How often experts of layers l and l + 1 share a patch, relative to chance.
function lifts(m, l) {
  const pairs = range(m.E).map((e) => range(m.E).map((f) => at(m, "together", l, e, f)));
  const rows = pairs.map(sum), columns = range(m.E).map((f) => sum(pairs.map((row) => row[f]))), all = sum(rows);
  return pairs.map((row, e) => row.map((n, f) => (rows[e] * columns[f] ? (n * all) / (rows[e] * columns[f]) : NaN)));
}

// Numbers of a class in each model, for classes that all models have. Names may occur twice.
const sameClasses = models.every((m) => String(m.classes) === String(models[0].classes));
const sharedClasses = models[0].order.map((c) => models.map((m) => (sameClasses ? c : m.classes.indexOf(models[0].classes[c])))).filter((numbers) => !numbers.includes(-1));
function drawClasses() {
  $("classSection").hidden = !sharedClasses.length;
  if (!sharedClasses.length) return;
  const numbersIn = (m) => sharedClasses.map((numbers) => numbers[models.indexOf(m)]);
  compare((m) => numbersIn(m).map((c) => ratios(m, "byClass", c, state.layer)), ratioScale, (m, shares, scale) => {
    const names = numbersIn(m).map((c) => m.classes[c]);
    matrix(m.views.byClass, {
      rows: names, columns: range(m.E), value: (r, e) => shares[r][e], scale, across: "expert",
      words: "relative to an equal share", pick: (r, e) => jump(state.layer, m, e),
      say: (r, e) => `${names[r]}, expert ${e}: × ${number(shares[r][e])}`,
      marked: m.E <= 24 && m.C === 1 ? (r, e) => e === m.expert : null,
    });
  });
}
function drawSteps() {
  compare((m) => range(m.S).map((s) => ratios(m, "byStep", s, state.layer)), ratioScale, (m, shares, scale) => matrix(m.views.byStep, {
    rows: range(m.E), columns: m.times, value: (e, s) => shares[s][e], scale, down: "expert", across: "t",
    words: "relative to an equal share", pick: (e) => jump(state.layer, m, e),
    say: (e, s) => `expert ${e}, t = ${m.times[s]}: × ${number(shares[s][e])}`,
  }));
}
function drawPlaces() {
  compare((m) => {
    const shares = range(m.places).map((t) => ratios(m, "byPlace", t, state.layer));
    return range(m.E).map((e) => shares.map((row) => row[e]));
  }, ratioScale, (m, values, scale) => {
    const captions = range(m.E).map((e) => (m.E > 16 ? String(e) : `expert ${e}`));
    maps(m.views.byPlace, { captions, grid: m.grid, values, scale, chosen: m.expert, pick: (e) => jump(state.layer, m, e) });
    showScale(m.views.placeScale, scale, "relative to an equal share");
  });
}
function drawSpent() {
  $("spentSection").hidden = !models.every((m) => m.tables.spent.shape[1]);
  if ($("spentSection").hidden) return;
  const stepsOf = (m) => [...new Set(range(10).map((i) => Math.round((i * (m.S - 1)) / 9)))];
  compare((m) => stepsOf(m).map((s) => range(m.places).map((t) => at(m, "spent", t, s, state.layer))), shareScale, (m, values, scale) => {
    maps(m.views.spent, { captions: stepsOf(m).map((s) => `t = ${m.times[s]}`), grid: m.grid, values, scale });
    showScale(m.views.spentScale, scale, "experts per patch");
  });
}
function drawOther() {
  const l = state.layer, othersOf = (m) => range(m.E).map((e) => sum(range(m.S).map((s) => at(m, "other", s, l, e))));
  $("otherSection").hidden = !models.every((m) => sum(othersOf(m)));
  if ($("otherSection").hidden) return;
  compare((m) => [m.load[l], othersOf(m)].map((counts) => counts.map((n) => (n / sum(counts)) * m.E)), ratioScale, (m, shares, scale) => matrix(m.views.other, {
    rows: ["patches", "others"], columns: range(m.E), value: (r, e) => shares[r][e], scale,
    across: "expert", words: "relative to an equal share", pick: (r, e) => jump(l, m, e),
    say: (r, e) => `${r ? "others" : "patches"}, expert ${e}: × ${number(shares[r][e])}`,
  }));
}
function drawFlow() {
  const l = state.layer;
  $("flowSection").hidden = l + 1 >= L;
  if (l + 1 >= L) return;
  compare((m) => lifts(m, l), ratioScale, (m, lift, scale) => matrix(m.views.flow, {
    rows: range(m.E), columns: range(m.E), value: (e, f) => lift[e][f], scale,
    down: `expert of layer ${nameOf(l)}`, across: `expert of layer ${nameOf(l + 1)}`, words: "relative to chance",
    say: (e, f) => `expert ${e}, then expert ${f}: × ${number(lift[e][f])}`, pick: (e, f) => jump(l + 1, m, f),
  }));
}
function drawKept() {
  const l = state.layer;
  compare((m) => range(L).map((i) => range(m.S - 1).map((s) => at(m, "kept", s, i))), shareScale, (m, values, scale) => {
    if (m.S === 1) { m.views.kept.textContent = "A single step has no next one."; return; }
    const chance = sum(range(L).map((i) => at(m, "perImage", i))) / L / m.S / m.patches / m.E;
    matrix(m.views.kept, {
      rows: range(L).map(nameOf), columns: m.times.slice(0, -1), value: (i, s) => values[i][s], scale,
      down: "layer", across: "t of the step", words: `share of experts kept (by chance, if loads are even: ${number(chance)})`, pick: (i) => choose(i, m, m.expert),
      say: (i, s) => `layer ${nameOf(i)}, t = ${m.times[s]} to ${m.times[s + 1]}: ${number(100 * values[i][s])} % kept`,
    });
  });
  compare((m) => range(m.places).map((t) => at(m, "keptWhere", t, l)), shareScale, (m, where, scale) => {
    if (m.S === 1) return;
    maps(m.views.keptWhere, { captions: [`layer ${nameOf(l)}`], grid: m.grid, values: [where], scale });
    showScale(m.views.keptScale, scale, "share of experts kept, mean over the steps");
  });
}
function drawSimilarity() {
  const l = state.layer, largest = (values) => SCALES.signed(Math.max(0.01, ...values.map(Math.abs)));
  compare((m) => range(m.E).map((e) => range(m.E).map((f) => (e === f ? NaN : at(m, "similarity", l, e, f)))), largest, (m, cosine, scale) => matrix(m.views.similarity, {
    rows: range(m.E), columns: range(m.E), value: (e, f) => cosine[e][f], scale,
    down: "expert", across: "expert", words: "cosine", pick: (e, f) => jump(l, m, f),
    say: (e, f) => `experts ${e} and ${f}: ${number(at(m, "similarity", l, e, f))}`,
  }));
}
const isMeasured = models.every((m) => m.tables.damage);
function drawDamage() {
  $("damageSection").hidden = !isMeasured;
  if (!isMeasured) return;
  const valuesOf = (k) => (m) => range(L).map((l) => range(m.E).map((e) => at(m, "damage", k, l, e)));
  const draw = (view, words, say) => (m, values, scale) => matrix(m.views[view], {
    rows: range(L).map(nameOf), columns: range(m.E), value: (l, e) => values[l][e], scale,
    down: "layer", across: "expert", words, pick: (l, e) => jump(l, m, e), say: (l, e) => `layer ${nameOf(l)}, expert ${e}: ${say(m, l, e)}`,
    marked: (l, e) => l === state.layer && e === m.expert,
  });
  compare(valuesOf(0), (values) => SCALES.share(Math.max(...values)), draw("damage", "change of pixels", (m, l, e) => `${number(100 * at(m, "damage", 0, l, e))} %`));
  const hasLoss = models.every((m) => valuesOf(1)(m).flat().some(Number.isFinite));
  models.forEach((m) => { m.views.lossPart.hidden = !hasLoss; });
  if (hasLoss) compare(valuesOf(1), (values) => SCALES.signed(Math.max(...values.map(Math.abs))), draw("loss", "change of the held-out loss; below 0 the model is better without the expert", (m, l, e) => `${number(at(m, "damage", 1, l, e))} ± ${number(at(m, "damage", 2, l, e))}`));
}
function drawAll() {
  readColours();
  $("layer").value = state.layer;
  $("chosen").textContent = models[0].layers[state.layer];
  document.querySelectorAll(".layer").forEach((element) => { element.textContent = nameOf(state.layer); });
  models.forEach((m) => { m.views.expert.value = m.expert; drawNumbers(m); });
  for (const draw of [drawLoad, drawExpert, drawClasses, drawSteps, drawPlaces, drawSpent, drawOther, drawFlow, drawKept, drawSimilarity, drawDamage]) draw();
}

// Chooses another expert; a page of one model goes through all layers.
function move(model, by) {
  const i = state.layer * model.E + model.expert + by;
  const layer = models.length > 1 ? state.layer : Math.floor(((i + L * model.E) % (L * model.E)) / model.E);
  choose(layer, model, (i + L * model.E) % model.E);
}
$("layer").append(...range(L).map((l) => new Option(nameOf(l), l)));
$("layer").onchange = () => choose(+$("layer").value, models[0], models[0].expert);
for (const model of models) {
  const { views, perClass } = model;
  views.about.textContent = model.about;
  views.enough.textContent = perClass < 20 ? `Only ${number(perClass)} image${perClass === 1 ? "" : "s"} a class: small differences are chance.` : `${number(perClass)} images a class; draw others with another seed before you trust a small difference.`;
  views.expert.append(...range(model.E).map((e) => new Option(e, e)));
  views.expert.onchange = () => choose(state.layer, model, +views.expert.value);
  views.before.onclick = () => move(model, -1);
  views.after.onclick = () => move(model, 1);
}
addEventListener("keydown", (event) => {
  if (event.target.tagName === "SELECT") return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) models.forEach((model) => move(model, by));
});
function fromAddress() {
  const found = /^#layer-(\d+)((?:-expert-\d+)*)$/.exec(location.hash);
  const layer = found ? models[0].numbers.indexOf(+found[1]) : -1;
  if (layer < 0) return;
  state.layer = layer;
  const experts = found[2].match(/\d+/g) ?? [];
  models.forEach((model, i) => { if (+experts[i] < model.E) model.expert = +experts[i]; });
}
fromAddress();
// Few experts of one model leave room for two columns of sections.
document.body.className = models.length > 1 ? "several" : models[0].E <= 16 ? "few" : "many";
document.body.style.setProperty("--models", models.length);
$("all").classList.toggle("whole", !isMeasured); // nothing stands beside it
let width = 0;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
width = innerWidth;
drawAll();
