"""The look of every page that the package writes."""

STYLE = """
:root { color-scheme: light dark; --ground: #f7f6f3; --card: #ffffff; --ink: #1d2126;
  --faint: #666c75; --line: #e2e0da; --bar: #3d6fb4; --warn: #b4501a; --warn-ground: #fbefe6;
  --good: #2c7a4b; --good-ground: #e7f3ea; --s1: #3d6fb4; --s2: #c2662d; --s3: #3c8d6a;
  --s4: #8b5bb0; --s5: #a8872a; --s6: #b2476e; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1e2125;
  --ink: #e7e5e0; --faint: #9aa0a9; --line: #32363c; --bar: #7aa5e0; --warn: #f0a070;
  --warn-ground: #33251c; --good: #7cc79a; --good-ground: #1b2c22; --s1: #7aa5e0; --s2: #e79a66;
  --s3: #74c29f; --s4: #b994dc; --s5: #d3b765; --s6: #e084a6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 14px 60px; max-width: 1080px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
body.wide { max-width: 1480px; }
@media (min-width: 1700px) { body.wide { max-width: 1720px; font-size: 17px; padding-top: 30px; } }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.08rem; margin: 34px 0 10px; }
p { margin: 6px 0; max-width: 72ch; }
.faint, figcaption, th { color: var(--faint); }
.faint { font-size: .9rem; }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr));
  margin: 18px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 14px; min-width: 0; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-weight: 600;
  overflow-wrap: anywhere; }
.tile span { color: var(--faint); font-size: .85rem; }
.warning b { color: var(--warn); }
ul.notes { list-style: none; padding: 0; margin: 14px 0; }
ul.notes li { padding: 8px 12px; margin: 6px 0; border-left: 3px solid var(--line);
  background: var(--card); border-radius: 0 8px 8px 0; overflow-wrap: anywhere; }
ul.notes li.warning { border-color: var(--warn); background: var(--warn-ground); }
ul.notes li.good { border-color: var(--good); background: var(--good-ground); }
.cards { display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); align-items: start; }
.card h3 { font-size: .95rem; margin: 2px 0 8px; font-weight: 600; }
.cards.curves {
  grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
.cards.tall { margin-top: 10px; }
.rows { display: grid; grid-template-columns: max-content 1fr; gap: 8px 14px; }
.rows > div { overflow-wrap: anywhere; }
.rows b { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: right; font-weight: 400; padding: 3px 8px; border-bottom: 1px solid var(--line); }
td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: minmax(72px, max-content) 1fr max-content;
  gap: 4px 10px; align-items: center; font-size: .9rem; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 10px; background: var(--bar); border-radius: 2px; }
.bars span { overflow-wrap: anywhere; }
.bars span:nth-child(3n) { text-align: right; color: var(--faint); }
svg.histogram { display: block; width: 100%; height: 74px; fill: var(--bar); }
.ends { display: flex; justify-content: space-between; color: var(--faint); font-size: .8rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 8px; }
figure { margin: 0; }
.sheet img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block;
  background: #8883; border-radius: 5px; }
figcaption { font-size: .72rem; text-align: center; }
.views { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; padding: 10px 0;
  border-bottom: 1px solid var(--line); }
.views img { display: block; border-radius: 4px; }
.views .whole { width: 104px; height: 104px; object-fit: contain; background: #8883; }
.views .gap { width: 10px; }
.best { font-weight: 650; }
small { color: var(--faint); }
code { font-size: .86em; overflow-wrap: anywhere; }
details > summary { cursor: pointer; margin: 10px 0; color: var(--faint); }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.chart text { fill: var(--faint); font: 11px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
svg.chart .grid { stroke: var(--line); stroke-width: 1; }
svg.chart .level { stroke: var(--warn); stroke-width: 1; stroke-dasharray: 4 3; }
svg.chart .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg.chart .band { opacity: .18; stroke: none; }
svg.chart .cursor { stroke: var(--faint); stroke-width: 1; visibility: hidden; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: .8rem; color: var(--faint); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 5px; }
.readout { font-size: .8rem; color: var(--faint); min-height: 1.4em;
  font-variant-numeric: tabular-nums; }
@media print { .card, .tile { break-inside: avoid; } }
"""

# A pointer over a chart shows the values below it. Each chart carries its points as JSON.
SCRIPT = """
for (const chart of document.querySelectorAll("svg.chart[data-points]")) {
  const data = JSON.parse(chart.dataset.points), cursor = chart.querySelector(".cursor");
  const readout = chart.parentNode.querySelector(".readout"), idle = readout.textContent;
  const box = data.box;
  chart.addEventListener("pointermove", event => {
    const area = chart.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width * box.width;
    const want = box.x0 + (x - box.left) / (box.right - box.left) * (box.x1 - box.x0);
    let nearest = null;
    const words = data.series.map(s => {
      if (!s.x.length) return "";
      let best = 0;
      s.x.forEach((v, i) => { if (Math.abs(v - want) < Math.abs(s.x[best] - want)) best = i; });
      if (nearest === null || Math.abs(s.x[best] - want) < Math.abs(nearest - want))
        nearest = s.x[best];
      return (data.series.length > 1 ? s.name + " " : "") + s.y[best];
    });
    const at = box.left + (nearest - box.x0) / ((box.x1 - box.x0) || 1) * (box.right - box.left);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at);
    cursor.style.visibility = "visible";
    readout.textContent = data.across + " " + nearest.toLocaleString("en") + ": "
      + words.filter(Boolean).join(", ");
  });
  chart.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden"; readout.textContent = idle;
  });
}
"""
