"""How a report looks, beyond what all pages share."""

STYLE = """
.head { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: baseline; }
.pill { font-size: .82rem; font-weight: 600; padding: 2px 11px; border-radius: 99px;
  background: var(--good-ground); color: var(--good); }
.pill.warning { background: var(--warn-ground); color: var(--warn); }
.pill.plain { background: var(--line); color: var(--ink); }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0 0; font-size: .9rem; }
nav a { color: var(--bar); text-decoration: none; padding: 4px 0; }
nav a:hover { text-decoration: underline; }
.t { display: block; aspect-ratio: 1; border-radius: 4px; background-repeat: no-repeat; }
.t.same { outline: 2.5px solid var(--good); outline-offset: -1px; }
.t.other { opacity: .72; }
.pair { display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); }
.strip { display: grid; grid-template-columns: 1.25fr 10px repeat(7, 1fr); gap: 4px;
  align-items: center; margin-bottom: 5px; }
.protos { display: grid; gap: 12px 22px;
  grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.proto { display: grid; grid-template-columns: repeat(8, 1fr); gap: 3px; margin-bottom: 4px; }
.proto + .faint { margin: 0 0 8px; font-size: .78rem; }
.map { position: relative; aspect-ratio: 16 / 10; overflow: hidden; border-radius: 7px; }
.map .t { position: absolute; width: 4.6%; transform: translate(-50%, -50%); border-radius: 3px;
  box-shadow: 0 0 0 1px var(--card); }
@media (max-width: 600px) { .map { aspect-ratio: 1; } .map .t { width: 7.4%; } }
.map .dot { position: absolute; width: 6px; height: 6px; margin: -3px; border-radius: 50%;
  background: var(--bar); opacity: .55; }
.heads { display: flex; flex-wrap: wrap; gap: 6px; padding: 8px 0;
  border-bottom: 1px solid var(--line); align-items: flex-start; }
.heads:last-child, .views:last-child { border-bottom: 0; }
.heads figure { width: 88px; }
.heads img, .heads .t { width: 88px; height: 88px; border-radius: 5px; display: block; }
.heads img { image-rendering: pixelated; }
.crops, .looks { display: grid; gap: 0 26px;
  grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)); }
@media (min-width: 1700px) { .cards.curves {
  grid-template-columns: repeat(auto-fill, minmax(390px, 1fr)); } }
@media (max-width: 600px) { .crops .views img { max-width: 21%; height: auto; }
  .crops .views .gap { width: 4px; } .heads { gap: 4px; } .heads figure { width: 31%; }
  .heads img, .heads .t { width: 100%; height: auto; } }
p.faint { max-width: 100ch; }
.keys { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1.4fr); gap: 3px 16px;
  font-size: .86rem; }
.keys > * { overflow-wrap: anywhere; }
.keys b { font-weight: 500; }
"""
