// The page: draws what methods.js computes. Texts are set as text, never as markup.
"use strict";
const explorer = (() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...inside) => {
    const node = document.createElement(tag);
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    node.append(...inside);
    return node;
  };
  const shape = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    return node;
  };

  const METHODS = {
    "CLIP-D": { run: (levels) => upclose.clipD(levels[0]), uses: [] },
    "WCA": { run: (levels, s) => upclose.wca(levels[0], s), uses: ["imageScale", "textScale", "crops"] },
    "LGCA": { run: (levels, s) => upclose.lgca(levels, s), uses: ["imageScale", "textScale", "crops", "step"] },
    "LaZSL": { run: (levels, s) => upclose.lazsl(levels[0], s), uses: ["epsilon", "theta", "crops"] },
    "D&D": { run: (levels, s) => upclose.dnd(levels[0], s), uses: ["epsilon", "crops"], set: "small" },
  };
  // Each slider: its words, and position 0..100 -> value.
  const power = (low, high) => (x) => low * (high / low) ** (x / 100);
  const SLIDERS = {
    epsilon: { words: "epsilon (entropy)", at: power(0.001, 1), start: { "LaZSL": 66.67, "D&D": 33.33 } },
    theta: { words: "theta (weight of crops)", at: (x) => x / 100, start: { "LaZSL": 80 } },
    imageScale: { words: "image scale", at: (x) => x * x / 100, start: { "WCA": 10, "LGCA": 10 } },
    textScale: { words: "text scale", at: (x) => x * x / 100, start: { "WCA": 10, "LGCA": 10 } },
    crops: { words: "crops", at: (x) => Math.max(1, Math.round(x / 100 * size())), start: {} },
    step: { words: "LGCA's step shown", at: (x) => Math.round(x / 100 * (cut().box.length - 1)), start: { "LGCA": 0 } },
  };

  const cases = {};
  let order = [], stops = [], picture = null, method = "LaZSL", position = {}, lit = null;
  const cut = () => picture.crops[METHODS[method].set || "square"];
  const size = () => cut().box[0].length;
  const settings = () => Object.fromEntries(METHODS[method].uses.map((name) => [name, SLIDERS[name].at(position[name])]));

  function views(k, n) {  // the levels of class k with the first n crops
    const set = METHODS[method].set || "square", said = picture.classes[k];
    return said.cos[set].map((level, t) => ({
      cos: level.slice(0, n), crop: cut().image[t].slice(0, n), whole: said.whole, label: said.label,
    }));
  }

  function compute() {
    const s = settings(), n = s.crops ?? size();
    return picture.classes.map((_, k) => METHODS[method].run(views(k, n), s));
  }

  function start() {
    position = Object.fromEntries(Object.entries(SLIDERS).map(([name, slider]) => [name, slider.start[method] ?? 100]));
  }

  function sliders() {
    $("sliders").replaceChildren(...METHODS[method].uses.map((name) => {
      const input = make("input", { type: "range", min: 0, max: 100, step: "any", id: `slider-${name}` });
      input.value = position[name];
      input.addEventListener("input", () => { position[name] = Number(input.value); lit = null; draw(); });
      return make("div", { class: "slider" }, make("label", { for: input.id }, SLIDERS[name].words), input,
        make("output", { id: `value-${name}`, for: input.id }));
    }));
  }

  const short = (x) => (Number.isInteger(x) ? String(x) : x.toPrecision(2));

  function draw() {
    const found = compute(), s = settings();
    METHODS[method].uses.forEach((name) => {
      $(`value-${name}`).textContent = name === "step" ? s.step + 1 : short(s[name]);
    });
    verdict(found);
    classes(found);
    boxes(found, s.step ?? 0, s.crops ?? size());
    return found;
  }

  function verdict(found) {
    const share = upclose.softmax(found.map((f) => f.score), 100);
    const rows = picture.classes.map((said, k) => {
      const fill = make("i");
      fill.style.width = `${100 * share[k]}%`;
      fill.style.background = `var(--${k ? "second" : "first"})`;
      const truth = picture.truth === null ? "" : k === picture.truth ? " (true)" : " (rival)";
      return make("div", { class: "score" },
        make("span", {}, make("bdi", {}, said.name), truth + " ", make("span", { class: "number" }, found[k].score.toFixed(4))),
        make("div", { class: "bar" }, fill));
    });
    $("verdict").replaceChildren(...rows);
  }

  function classes(found) {
    const blocks = picture.classes.map((said, k) => {
      const most = Math.max(...found.flatMap((f) => f.description));
      const lines = said.sentence.map((sentence, m) => {
        const mass = lit && lit.crop !== undefined ? found[k].plan?.[lit.crop]?.[m] ?? 0 : found[k].description[m];
        const top = lit && lit.crop !== undefined ? Math.max(1e-9, ...found.flatMap((f) => f.plan?.[lit.crop] ?? [0])) : most;
        const bar = make("i");
        bar.style.width = `${3.8 * mass / top}rem`;
        const line = make("li", { tabindex: 0 }, bar, make("bdi", {}, sentence),
          make("span", { class: "number", title: "cosine, as matched" }, ` ${found[k].matched[m].toFixed(3)}`));
        const light = (on) => { lit = on ? { k, m } : null; boxes(compute(), settings().step ?? 0, settings().crops ?? size()); };
        line.addEventListener("mouseenter", () => light(true));
        line.addEventListener("mouseleave", () => light(false));
        line.addEventListener("focus", () => light(true));
        line.addEventListener("blur", () => light(false));
        return line;
      });
      return make("div", { class: `class ${k ? "two" : "one"}` }, make("h2", { dir: "auto" }, said.name),
        make("ul", {}, ...(lines.length ? lines : [make("li", {}, "no descriptions")])));
    });
    $("classes").replaceChildren(...blocks);
  }

  function boxes(found, step, n) {
    const svg = $("picture"), level = cut().box[Math.min(step, cut().box.length - 1)];
    svg.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    const image = shape("image", { href: picture.file, width: picture.width, height: picture.height });
    const chosen = found[lit?.k ?? 0];
    const weight = chosen.plan === null ? level.slice(0, n).map(() => 0)
      : lit?.m !== undefined ? chosen.plan.map((row) => row[lit.m]) : chosen.crop;
    const most = Math.max(1e-12, ...weight);
    const drawn = level.slice(0, n).map(([x0, y0, x1, y1], c) => {
      const box = shape("rect", { class: "crop", x: x0, y: y0, width: x1 - x0, height: y1 - y0, tabindex: 0,
        "stroke-width": 0.5 + 3.5 * weight[c] / most, "stroke-opacity": 0.15 + 0.85 * weight[c] / most });
      box.append(Object.assign(shape("title", {}), { textContent: `crop ${c + 1}, mass ${weight[c].toFixed(3)}` }));
      const light = (on) => { lit = on ? { crop: c } : null; classes(found); };
      box.addEventListener("mouseenter", () => light(true));
      box.addEventListener("mouseleave", () => light(false));
      box.addEventListener("focus", () => light(true));
      box.addEventListener("blur", () => light(false));
      return box;
    });
    const parts = $("parts").checked ? picture.parts.flatMap(([name, x0, y0, x1, y1]) => {
      const text = shape("text", { x: x0, y: y0, "font-size": picture.height / 28 });
      text.textContent = name;
      return [shape("rect", { class: "part", x: x0, y: y0, width: x1 - x0, height: y1 - y0 }), text];
    }) : [];
    svg.replaceChildren(image, ...drawn.reverse(), ...parts);
  }

  function choose(name) {
    method = name;
    start();
    lit = null;
    for (const button of $("methods").children) button.setAttribute("aria-pressed", button.textContent === name);
    sliders();
    draw();
  }

  function show(id, then) {
    if (!(id in cases)) {  // the first time: its file is a script, so that the page opens from a disk
      const script = make("script", { src: `data/${id}.js` });
      script.addEventListener("load", () => show(id, then));
      script.addEventListener("error", () => { $("why").textContent = `The page's file data/${id}.js cannot be read.`; });
      document.head.append(script);
      return;
    }
    picture = cases[id];
    lit = null;
    for (const button of $("pictures").children) button.setAttribute("aria-pressed", button.dataset.id === id);
    $("why").textContent = picture.why;
    $("parts").parentElement.hidden = picture.parts.length === 0;
    choose(method);
    if (then) then();
  }

  function stop(place) {
    const { id, method: name, at, said, link } = stops[place];
    [...$("stops").children].forEach((button, k) => button.setAttribute("aria-pressed", k === place));
    show(id, () => {
      choose(name);
      Object.assign(position, at);
      sliders();
      draw();
      $("said").replaceChildren(said + " ", ...(link ? [make("a", { href: link }, "The notebook's section.")] : []));
    });
  }

  function begin(index) {  // {pictures: [{id, file, alt}], stops: [...]}
    order = index.pictures;
    stops = index.stops;
    $("pictures").replaceChildren(...order.map(({ id, file, alt }) => {
      const button = make("button", { "data-id": id, "aria-pressed": false, title: alt },
        make("img", { src: file, alt, loading: "lazy" }));
      button.addEventListener("click", () => show(id));
      return button;
    }));
    $("pictures").hidden = order.length < 2;
    $("tour").hidden = stops.length === 0;
    $("stops").replaceChildren(...stops.map(({ title }, place) => {
      const button = make("button", { "aria-pressed": false }, title);
      button.addEventListener("click", () => stop(place));
      return button;
    }));
    $("methods").replaceChildren(...Object.keys(METHODS).map((name) => {
      const button = make("button", {}, name);
      button.addEventListener("click", () => choose(name));
      return button;
    }));
    $("parts").addEventListener("change", draw);
    show(order[0].id);
  }

  return { begin, add: (id, data) => { cases[id] = data; }, choose, show, draw,
    set: (values) => { Object.assign(position, values); sliders(); return draw(); } };
})();
