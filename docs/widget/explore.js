/* The interactive page: reads window.EXPLORE (figures/explore/explore.json) and draws one chain. No library, no call. */
"use strict";

(() => {
  const data = window.EXPLORE;
  const root = document.getElementById("explore");
  if (!data || !root) return;

  const find = (selector) => root.querySelector(selector);
  const slider = find("input[type=range]");
  const state = { row: data.rows.length - 1, label: 0, chain: 0, stage: 0, statistics: "running" };
  const NAMES = { running: "running averages, as it classifies", batch: "the batch, as its chains see it" };
  let timer = null;

  // The three formulas of the method: all the rest is drawing.
  const joint = (logits, y) => -logits[y];
  function marginal(logits) {
    const top = Math.max(...logits);
    return -(top + Math.log(logits.reduce((sum, v) => sum + Math.exp(v - top), 0)));
  }
  const probability = (logits, y) => Math.exp(marginal(logits) - joint(logits, y));

  const row = () => data.rows[state.row];
  const line = (chain) => state.label * data.chains + chain;
  const logitsAt = (stage) => row().logits[state.statistics][stage][line(state.chain)];
  const number = (v) => v.toFixed(2).replace("-", "−");

  /* Where on its sheet the image of a chain at a stage is: columns are stages, lines are chains. */
  function show(element, stage, chain) {
    const columns = row().stages.length;
    const lines = data.classes.length * data.chains;
    element.style.backgroundImage = `url("${data.folder}/${row().sheet}")`;
    element.style.backgroundSize = `${100 * columns}% ${100 * lines}%`;
    element.style.backgroundPosition =
      `${(100 * stage) / Math.max(columns - 1, 1)}% ${(100 * line(chain)) / Math.max(lines - 1, 1)}%`;
  }

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  /* A group of radio buttons: the arrow keys work in it as in any other. */
  function options(name, entries, change) {
    const place = find(`[data-options=${name}]`);
    entries.forEach(([value, content], i) => {
      const input = make("input", { type: "radio", name: `explore-${name}`, value, id: `explore-${name}-${i}` });
      input.addEventListener("change", () => { change(value); draw(); });
      place.append(input, make("label", { for: input.id }, content));
    });
  }

  function check(name, value) {
    for (const input of root.querySelectorAll(`input[name=explore-${name}]`)) {
      input.checked = input.value === String(value);
    }
  }

  /* Another row has other stages: stay as far along the chain as before. */
  function choose(i) {
    const along = state.stage / Math.max(row().stages.length - 1, 1);
    state.row = i;
    state.stage = Math.round(along * (row().stages.length - 1));
    film();
  }

  function film() {
    const stages = row().stages.map(() => make("span"));
    find(".explore-film").replaceChildren(...stages);
    root.style.setProperty("--stages", stages.length);
    slider.max = stages.length - 1;
    stages.forEach((element, i) => element.addEventListener("click", () => { stop(); go(i); }));
  }

  function chart() {
    const all = row().stages.map((_, i) => logitsAt(i));
    const real = row().real[state.statistics];
    const curves = { joint: all.map((l) => joint(l, state.label)), marginal: all.map(marginal) };
    const values = [...curves.joint, ...curves.marginal, real];
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const x = (i) => (120 * (i + 0.5)) / all.length;
    const y = (v) => 86 - (72 * (v - low)) / (high - low || 1);
    const points = (curve) => curve.map((v, i) => `${x(i).toFixed(2)},${y(v).toFixed(2)}`).join(" ");
    const at = x(state.stage);
    const svg = find("svg");
    svg.innerHTML = `<line class="here" x1="${at}" x2="${at}" y1="0" y2="100"/>`
      + `<line class="real" x1="0" x2="120" y1="${y(real)}" y2="${y(real)}"/>`
      + ["joint", "marginal"].map((name) => `<polyline class="${name}" points="${points(curves[name])}"/>`).join("");
    svg.setAttribute("aria-label", `E(x) goes from ${number(curves.marginal[0])} to ${number(curves.marginal.at(-1))}, `
      + `E(x, y) from ${number(curves.joint[0])} to ${number(curves.joint.at(-1))}; `
      + `real images have ${number(real)} on average`);
    const [top, bottom] = root.querySelectorAll(".explore-scale span");
    [top.textContent, bottom.textContent] = [`highest ${number(high)}`, `lowest ${number(low)}`];
  }

  function classes(logits) {
    find(".explore-classes tbody").replaceChildren(...data.classes.map((name, y) => {
      const p = probability(logits, y);
      const bar = make("span", { class: "explore-bar", style: `width: ${(100 * p).toFixed(1)}%` });
      const attributes = y === state.label ? { class: "wanted" } : {};
      const cells = [make("th", { scope: "row" }, name), make("td", {}, bar), make("td", {}, p.toFixed(3))];
      return make("tr", attributes, ...cells);
    }));
  }

  /* `remember`: the address follows what a reader chose; it stays while it names a place on the page. */
  function draw(remember = true) {
    const { stages, title, settings, folder } = row();
    const stage = stages[state.stage];
    const logits = logitsAt(state.stage);
    const name = data.classes[state.label];
    const y = state.label;
    const values = { marginal: marginal(logits), joint: joint(logits, y), wanted: probability(logits, y) };
    for (const [key, value] of Object.entries({ ...state, row: row().key })) check(key, value);
    root.querySelectorAll(".explore-images [role=img]").forEach((element, chain) => {
      show(element, state.stage, chain);
      element.setAttribute("aria-label", `Chain ${chain + 1}: ${name}, ${stage}`);
    });
    root.querySelectorAll(".explore-film span").forEach((element, i) => {
      show(element, i, state.chain);
      element.classList.toggle("here", i === state.stage);
    });
    slider.value = state.stage;
    slider.setAttribute("aria-valuetext", `${stage}, ${state.stage + 1} of ${stages.length}`);
    find(".explore-stage").textContent = stage;
    for (const [key, value] of Object.entries(values)) find(`[data-number=${key}]`).textContent = number(value);
    chart();
    classes(logits);
    find(".explore-said").textContent = `${title}: ${settings}. Weights: ${folder}.`;
    const said = `${title}, ${name}, ${stage}: E(x) ${number(values.marginal)}, E(x, y) ${number(values.joint)}, `
      + `p(y | x) ${number(values.wanted)}`;
    if (timer === null) find(".explore-status").textContent = said;
    const place = [row().key, name, state.chain + 1, state.stage, state.statistics].map(encodeURIComponent).join("/");
    if (remember) history.replaceState(null, "", `#${place}`);
  }

  function go(stage) {
    state.stage = Math.min(Math.max(stage, 0), row().stages.length - 1);
    draw();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    find("[data-play]").textContent = "Play";
  }

  function play() {
    if (timer !== null) { stop(); draw(); return; }
    if (state.stage === row().stages.length - 1) go(0);
    find("[data-play]").textContent = "Pause";
    timer = setInterval(() => {
      go(state.stage + 1);
      if (state.stage === row().stages.length - 1) { stop(); draw(); }
    }, 450);
  }

  function decoded(text) {
    try { return decodeURIComponent(text); } catch { return ""; }
  }

  /* The address names what is shown, so that it can be passed on. */
  function read(address) {
    const [key, name, chain, stage, statistics] = address.slice(1).split("/").map(decoded);
    const i = data.rows.findIndex((entry) => entry.key === key);
    if (i < 0) return false;
    state.row = i;
    state.label = Math.max(data.classes.indexOf(name), 0);
    state.chain = Math.min(Math.max((parseInt(chain, 10) || 1) - 1, 0), data.chains - 1);
    state.stage = Math.min(Math.max(parseInt(stage, 10) || 0, 0), row().stages.length - 1);
    state.statistics = statistics in NAMES ? statistics : "running";
    return true;
  }

  const rows = data.rows.map((entry) => [entry.key, entry.title]);
  const chains = Array.from({ length: data.chains }, (_, i) => [i, make("span", { role: "img" })]);
  options("row", rows, (key) => choose(data.rows.findIndex((entry) => entry.key === key)));
  options("label", data.classes.map((name, i) => [i, name]), (i) => { state.label = i; });
  options("statistics", Object.entries(NAMES), (name) => { state.statistics = name; });
  options("chain", chains, (i) => { state.chain = i; });
  slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
  find("[data-play]").addEventListener("click", play);
  for (const button of root.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => { stop(); go(state.stage + Number(button.dataset.move)); });
  }
  /* Left and right move along the chain from anywhere but where they have a meaning of their own. */
  document.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const own = event.target.closest("input, select, textarea, [contenteditable]");
    if (!move || own || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    stop();
    go(state.stage + move);
  });
  window.addEventListener("hashchange", () => { if (read(location.hash)) { stop(); film(); draw(false); } });

  read(location.hash);
  for (const part of root.querySelectorAll("[hidden]")) part.hidden = false;
  film();
  draw(false);
})();
