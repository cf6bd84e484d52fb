"use strict";
(() => {
  const { models, rows } = JSON.parse(document.getElementById("data-samples").textContent);
  const base = models.indexOf("base");
  const tuned = models.indexOf("tuned");
  const PAGE = 25;
  const MAX_DIFF_CELLS = 4e6; // words of one answer times words of the other
  const byId = (id) => document.getElementById(id);

  // A score is the mean over samples of the mean over a sample's verdicts, as in report.json.
  function scoreOf(cell) {
    const samples = new Map();
    for (const [sample, , state, score] of cell.v) {
      if (state === "scored") (samples.get(sample) || samples.set(sample, []).get(sample)).push(score);
    }
    const means = [...samples.values()].map(mean);
    return means.length ? mean(means) : null;
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  function spreadOf(cell) {
    const scores = cell.v.filter((v) => v[2] === "scored").map((v) => v[3]);
    return scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : 0;
  }

  rows.forEach((row, index) => {
    row.index = index;
    row.scores = row.m.map(scoreOf);
    row.before = base >= 0 ? row.scores[base] : null;
    row.after = tuned >= 0 ? row.scores[tuned] : null;
    row.change = row.before === null || row.after === null ? null : row.after - row.before;
    row.spread = Math.max(0, ...row.m.map(spreadOf));
    row.disagreement = Math.max(0, ...row.m.flatMap((cell) => cell.v.map((v) => v[5])));
    row.outcome = row.change === null ? "unscored" : row.change > 0 ? "better" : row.change < 0 ? "worse" : "equal";
  });

  // Lower-casing all texts takes a moment, so it waits for the first search or for an idle one.
  let haystacks = null;
  function buildHaystacks() {
    haystacks ||= rows.map((row) =>
      [row.i, row.c, row.p, row.r, ...row.m.flatMap((cell) => [...cell.t, ...cell.v.map((v) => v[4])])]
        .join("\n").toLowerCase());
  }

  const last = (value, missing) => (value === null ? missing : value);
  const orders = {
    changed: (row) => -Math.abs(last(row.change, 0)) + (row.change === null ? 1 : 0),
    up: (row) => -last(row.change, -Infinity),
    down: (row) => last(row.change, Infinity),
    best: (row) => -last(row.after, -Infinity),
    worst: (row) => last(row.after, Infinity),
    spread: (row) => -row.spread,
    disagreement: (row) => -row.disagreement,
    order: (row) => row.index,
  };

  let found = rows;
  let shown = 0;
  function update() {
    const words = byId("search").value.trim().toLowerCase();
    const category = byId("category").value;
    const outcome = byId("outcome").value;
    const key = orders[byId("sort").value];
    if (words) buildHaystacks();
    found = rows.filter((row) =>
      (!category || row.c === category) && (!outcome || row.outcome === outcome) &&
      (!words || haystacks[row.index].includes(words)));
    const keys = new Map(found.map((row) => [row, key(row)]));
    found.sort((a, b) => (keys.get(a) < keys.get(b) ? -1 : keys.get(a) > keys.get(b) ? 1 : a.index - b.index));
    shown = 0;
    showOrder(byId("sort").value);
    byId("rows").replaceChildren();
    byId("count").textContent = found.length === rows.length
      ? `${rows.length.toLocaleString("en")} prompts`
      : `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} prompts`;
    showMore();
  }
  // A column's button goes through the orders that are about it.
  const columns = [...document.querySelectorAll(".columns button")];
  const ascending = new Set(["down", "worst", "order"]);
  function showOrder(order) {
    for (const button of columns) {
      const on = button.dataset.orders.split(" ").includes(order);
      button.classList.toggle("on", on);
      button.setAttribute("aria-pressed", String(on));
      button.dataset.arrow = order === "changed" ? "\u2195" : ascending.has(order) ? "\u2191" : "\u2193";
    }
  }
  function nextOrder(button) {
    const own = button.dataset.orders.split(" ");
    byId("sort").value = own[(own.indexOf(byId("sort").value) + 1) % own.length];
    update();
  }
  function showMore() {
    const next = found.slice(shown, shown + PAGE);
    byId("rows").append(...next.map(line));
    shown += next.length;
    byId("more").hidden = shown >= found.length;
    byId("more").textContent = `Show more (${(found.length - shown).toLocaleString("en")} left)`;
  }

  // Texts only ever become text nodes.
  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  }
  function text(value) {
    const element = make("pre", "", value);
    element.dir = "auto";
    return element;
  }
  function thought(words) {
    if (!words) return [];
    return [make("details", "thought", make("summary", "", `Thought, ${words.length.toLocaleString("en")} characters`), text(words))];
  }
  const figure = (value) => (value === null ? "\u2013" : Number.isInteger(value) ? String(value) : value.toFixed(1));
  const signed = (value) => (value > 0 ? "+" : value < 0 ? "\u2212" : "") + figure(Math.abs(value));

  // One line of a prompt; the heading over an Alpaca row's input is the template's word, not the user's.
  const title = (prompt) => prompt.slice(0, 600).replace(/\s*^#{2,} *[\w ]{1,30}: *$\s*/gm, " \u00b7 ").replace(/\s+/g, " ").trim().slice(0, 300);

  function line(row) {
    const scores = base >= 0 && tuned >= 0
      ? [figure(row.before), " \u2192 ", make("b", "", figure(row.after))]
      : [row.scores.map(figure).join(" / ")];
    const ask = make("span", "ask", title(row.p) || "(no prompt)");
    ask.dir = "auto";
    const summary = make("summary", "",
      make("span", "", ask, make("span", "meta", [row.i, row.c].filter(Boolean).join(" \u00b7 "))),
      make("span", "pair", ...scores),
      make("span", `change ${row.outcome}`, row.change === null ? "no score" : signed(row.change)));
    const element = make("details", "row", summary);
    element.addEventListener("toggle", () => {
      if (element.open && element.childElementCount === 1) element.append(detail(row));
    });
    return element;
  }

  function detail(row) {
    const marked = base >= 0 && tuned >= 0 && row.m[base].t.length && row.m[tuned].t.length
      ? difference(row.m[base].t[0], row.m[tuned].t[0]) : null;
    const sides = models.map((model, index) => {
      const cell = row.m[index];
      const side = index === base ? 0 : index === tuned ? 1 : -1;
      const texts = cell.t.flatMap((value, sample) => [
        ...thought((cell.h || [])[sample]),
        marked && side >= 0 && sample === 0 ? markedText(marked[side]) : text(value)]);
      return make("div", `box ${side === 0 ? "base" : side === 1 ? "tuned" : ""}`,
        make("h4", "", `${model} \u00b7 ${figure(row.scores[index])}`),
        ...(texts.length ? texts : [make("p", "muted", "no response in the files")]),
        ...cell.v.map(([, , state, score, words]) =>
          make("div", "verdict", text(`${state === "scored" ? figure(score) : state.replaceAll("_", " ")}${words ? `: ${words}` : ""}`))));
    });
    return make("div", "detail",
      make("div", "box", make("h4", "", "Prompt"), text(row.p)),
      make("div", "box", make("h4", "", "Reference"), ...thought(row.h), text(row.r)),
      make("div", "sides", ...sides));
  }

  function markedText(parts) {
    const element = text("");
    element.append(...parts.map(([same, words]) => (same ? words : make("mark", "", words))));
    return element;
  }

  // Words of both answers, marked where the other has no such word at that place (longest common subsequence).
  function difference(first, second) {
    const a = first.match(/\s*\S+/gu) || [];
    const b = second.match(/\s*\S+/gu) || [];
    if (a.length * b.length > MAX_DIFF_CELLS) return null;
    const width = b.length + 1;
    const common = new Uint32Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        common[i * width + j] = a[i].trim() === b[j].trim()
          ? common[(i + 1) * width + j + 1] + 1
          : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
      }
    }
    const sides = [[], []];
    const put = (side, same, word) => {
      const parts = sides[side];
      const end = parts[parts.length - 1];
      if (end && end[0] === same) end[1] += word; else parts.push([same, word]);
    };
    let i = 0;
    let j = 0;
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i].trim() === b[j].trim()) {
        put(0, true, a[i++]);
        put(1, true, b[j++]);
      } else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) {
        put(0, false, a[i++]);
      } else {
        put(1, false, b[j++]);
      }
    }
    return sides;
  }

  document.documentElement.classList.add("js");
  // Orders in which all rows are equal are no orders.
  for (const key of ["spread", "disagreement"]) {
    if (rows.every((row) => row[key] === 0)) document.querySelector(`#sort option[value=${key}]`).remove();
  }
  for (const category of [...new Set(rows.map((row) => row.c))].sort()) {
    const option = make("option", "", category);
    option.value = category;
    byId("category").append(option);
  }
  byId("search").addEventListener("input", update);
  for (const id of ["category", "outcome", "sort"]) byId(id).addEventListener("change", update);
  for (const button of columns) button.addEventListener("click", () => nextOrder(button));
  byId("more").addEventListener("click", showMore);
  window.addEventListener("beforeprint", () => {
    for (const element of document.querySelectorAll("#setup details")) element.open = true;
  });
  update();
  (window.requestIdleCallback || setTimeout)(buildHaystacks);
})();
