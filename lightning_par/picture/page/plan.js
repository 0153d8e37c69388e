// The best layouts of a search: tables with bars, of which each part has its share of the longest.
{
  const { plan, title, panels } = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const element = (tag, text, parent) => parent.appendChild(Object.assign(document.createElement(tag), { textContent: text }));

  // A table of headings and lines; after the first cell of each is its bar.
  function fill(table, { headings, lines }, colours) {
    const head = element("tr", "", element("thead", "", table)), body = element("tbody", "", table);
    for (const name of [headings[0], "", ...headings.slice(1)]) element("th", name, head).scope = "col";
    for (const { cells, parts, mark } of lines) {
      const line = element("tr", "", body);
      element("th", cells[0], line).scope = "row";
      const bar = element("div", "", element("td", "", line));
      for (const words of cells.slice(1)) element("td", words, line);
      bar.className = "bar";
      for (const { name, share, words } of parts) {
        const part = element("i", "", bar);
        part.style.width = `${100 * share}%`;
        part.style.background = colours[name];
        part.title = `${name} ${words}`;
      }
      bar.setAttribute("role", "img");
      bar.setAttribute("aria-label", parts.map(({ name, words }) => `${name} ${words}`).join(", "));
      if (mark !== null) element("b", "", bar).style.left = `${100 * mark}%`;
    }
  }

  function legend(list, colours, lines) {
    const present = new Set(lines.flatMap(({ parts }) => parts.map(({ name }) => name)));
    for (const [name, colour] of Object.entries(colours)) {
      if (!present.has(name)) continue;
      const line = element("li", "", list);
      element("i", "", line).style.background = colour;
      element("span", name, line);
    }
  }

  get("title").textContent = title;
  get("lead").textContent = plan.lead;
  fill(get("best"), plan.best, plan.colours);
  legend(get("parts"), plan.colours, plan.best.lines);
  fill(get("memory"), plan.memory, plan.colours);
  legend(get("kinds"), plan.colours, plan.memory.lines);
  fill(get("traffic"), plan.traffic, plan.colours);
  for (const words of plan.advice) element("li", words, get("advice"));
  for (const [words, reason] of plan.misses) {
    element("dt", words, get("misses"));
    element("dd", reason, get("misses"));
  }
  if (!panels) get("timeline").remove();
}
