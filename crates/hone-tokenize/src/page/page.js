"use strict";
// Search, order and filters over the rows that the page holds. Works on the elements that are there; nothing of a row is
// ever read as markup. The state stands in the address behind the #, so that it can be sent to somebody.
(() => {
  const at = (id) => document.getElementById(id);
  const tools = at("tools"), rows = at("rows"), tip = at("tip"), hits = at("hits");
  const all = [...rows.children];
  const place = new Map(all.map((row, n) => [row, n]));
  const number = (row, key) => Number(row.dataset[key]);
  const words = new Map();
  const text = (row) => {
    if (!words.has(row)) words.set(row, row.textContent.toLowerCase());
    return words.get(row);
  };
  const share = (row) => number(row, "trained") / Math.max(1, number(row, "tokens"));
  const refused = (row) => (row.className.includes("refused") ? 0 : 1);
  const orders = {
    "": (a, b) => place.get(a) - place.get(b),
    worst: (a, b) => refused(a) - refused(b) || number(b, "lost") - number(a, "lost") || share(a) - share(b) || orders[""](a, b),
    long: (a, b) => number(b, "tokens") - number(a, "tokens") || orders[""](a, b),
    least: (a, b) => share(a) - share(b) || orders[""](a, b),
  };
  const keys = ["q", "sort", "source", "role", "state", "row"];

  // The places of `word` in a row, across token borders.
  const ranges = (row, word) => {
    const nodes = [], starts = [];
    let whole = "";
    const walk = document.createTreeWalker(row, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      starts.push(whole.length);
      nodes.push(walk.currentNode);
      whole += walk.currentNode.data;
    }
    const lower = whole.toLowerCase();
    // Where lower case has another length, places would be off by some: then the row is found, and not marked.
    if (lower.length !== whole.length) return [];
    const node = (offset) => {
      let low = 0, high = nodes.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (starts[middle] <= offset) low = middle; else high = middle - 1;
      }
      return low;
    };
    const found = [];
    for (let from = lower.indexOf(word); from >= 0 && found.length < 200; from = lower.indexOf(word, from + word.length)) {
      const range = new Range(), first = node(from), last = node(from + word.length - 1);
      range.setStart(nodes[first], from - starts[first]);
      range.setEnd(nodes[last], from + word.length - starts[last]);
      found.push(range);
    }
    return found;
  };

  const mark = (shown, word) => {
    if (!("highlights" in CSS)) return;
    CSS.highlights.delete("found");
    if (!word) return;
    const found = [];
    for (const row of shown) {
      if (found.length > 1000) break;
      found.push(...ranges(row, word));
    }
    CSS.highlights.set("found", new Highlight(...found));
  };

  const apply = (jump) => {
    const [word, sort, source, role, state, row] = keys.map((key) => at(key).value);
    const low = word.toLowerCase();
    const keep = (article) =>
      (!low || text(article).includes(low)) &&
      (!source || article.dataset.source === source) &&
      (!role || article.dataset.roles.split("\n").includes(role)) &&
      (!state || article.className.split(" ").includes(state));
    const shown = all.filter(keep).sort(orders[sort] || orders[""]);
    const visible = new Set(shown);
    for (const article of all) {
      article.hidden = !visible.has(article);
      article.classList.remove("here");
    }
    rows.append(...shown);
    mark(shown, low);
    hits.textContent = shown.length === all.length ? `${all.length} rows` : `${shown.length} of ${all.length} rows`;
    const target = row === "" ? undefined : shown.find((article) => article.dataset.n === row);
    if (row !== "" && !target) hits.textContent += `, no row ${row} among them`;
    if (target) {
      target.classList.add("here");
      if (jump) target.scrollIntoView({ block: "start" });
    }
    const hash = keys.filter((key) => at(key).value !== "").map((key) => `${key}=${encodeURIComponent(at(key).value)}`);
    try {
      history.replaceState(null, "", hash.length ? `#${hash.join("&")}` : location.pathname + location.search);
    } catch {
      // Some browsers keep the address of a local file as it is.
    }
  };

  const load = () => {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const key of keys) at(key).value = wanted.get(key) ?? "";
    for (const key of ["sort", "source", "role", "state"]) {
      if (at(key).selectedIndex < 0) at(key).value = "";
    }
    apply(true);
  };

  let timer = 0;
  at("q").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(apply, 120, false);
  });
  for (const key of keys.slice(1)) at(key).addEventListener("change", () => apply(key === "row"));
  at("borders").addEventListener("change", (event) => rows.classList.toggle("borders", event.target.checked));
  tools.addEventListener("submit", (event) => {
    event.preventDefault();
    apply(true);
  });
  addEventListener("hashchange", load);

  // One tip for all tokens: the rule stands at the run, index and id at the token.
  const move = (event) => {
    const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 12);
    const below = event.clientY + 18;
    const top = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
    tip.style.setProperty("--x", `${Math.max(4, left)}px`);
    tip.style.setProperty("--y", `${Math.max(4, top)}px`);
  };
  rows.addEventListener("pointerover", (event) => {
    const token = event.target.closest("i[data-t]");
    if (!token) {
      tip.hidden = true;
      return;
    }
    const run = token.parentElement;
    if (run.title) {
      run.dataset.rule = run.title;
      run.removeAttribute("title");
    }
    const [index, id] = token.dataset.t.split(" ");
    tip.textContent = `token ${index} · id ${id}\n${run.dataset.rule}`;
    tip.hidden = false;
    move(event);
  });
  rows.addEventListener("pointermove", (event) => tip.hidden || move(event));
  rows.addEventListener("pointerleave", () => (tip.hidden = true));
  addEventListener("scroll", () => (tip.hidden = true), { passive: true });

  tools.hidden = false;
  load();
})();
