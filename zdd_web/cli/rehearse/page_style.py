"""The CSS of the HTML report, light and dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1a; --soft: #5f5e58; --page: #fcfcfb; --card: #fff; --line: #e3e2dd;
  --g0: #2a78d6; --g1: #1baf7a; --g2: #eda100; --g3: #4a3aa7; --gx: #8a8983; --bad: #d03b3b; --good: #0a7a3d;
  --event: #00000014; }
@media (prefers-color-scheme: dark) { :root { --ink: #f2f1ed; --soft: #b3b2aa; --page: #171716; --card: #1f1f1d;
  --line: #383834; --g0: #3987e5; --g1: #199e70; --g2: #c98500; --g3: #9085e9; --gx: #8a8983; --bad: #f0635f;
  --good: #3fbf7f; --event: #ffffff1f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 20px 16px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; line-height: 1.3; margin: 0 0 4px; }
h2 { font-size: 14px; font-weight: 600; margin: 22px 0 4px; }
p, ul { margin: 4px 0; color: var(--soft); }
.verdict { border-left: 5px solid var(--good); padding-left: 12px; margin-bottom: 12px; }
.verdict.bad { border-color: var(--bad); }
.problems li { color: var(--ink); overflow-wrap: anywhere; } .problems { padding-left: 18px; }
.row { display: grid; grid-template-columns: 92px minmax(0, 1fr); column-gap: 8px; align-items: stretch; }
.label { position: relative; font-size: 12px; color: var(--soft); text-align: right; line-height: 1;
  font-variant-numeric: tabular-nums; }
.label span { position: absolute; right: 0; transform: translateY(-50%); white-space: nowrap; }
.label.middle { align-self: center; }
.plot { position: relative; } svg { display: block; width: 100%; height: 100%; overflow: visible; }
.tall { height: 190px; } .low { height: 120px; } .strip { height: 18px; margin-bottom: 9px; }
.phase { height: 16px; margin: 1px 0; }
.axis { height: 18px; font-size: 12px; color: var(--soft); }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis span:first-child { transform: none; }
.numbers { height: 18px; font-size: 11px; } .numbers span { position: absolute; transform: translateX(-50%); }
.numbers .bad { color: var(--bad); font-weight: 700; }
.g0 { fill: var(--g0); } .g1 { fill: var(--g1); } .g2 { fill: var(--g2); } .g3 { fill: var(--g3); }
.gx { fill: var(--gx); }
.booting { opacity: .35; } .retiring, .draining, .lame_duck { opacity: .6; }
.event { fill: var(--event); } .lost { fill: var(--bad); }
.grid { stroke: var(--line); fill: none; vector-effect: non-scaling-stroke; stroke-width: 1; }
.curve { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2; stroke-linejoin: round; }
.p50 { stroke: var(--g0); } .p99 { stroke: var(--g2); } .slowest { stroke: var(--gx); stroke-width: 1; }
.key { display: inline-flex; align-items: center; gap: 5px; margin-right: 14px; font-size: 12px; color: var(--soft);
  white-space: nowrap; }
.key i { width: 12px; height: 12px; border-radius: 2px; display: inline-block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bad { color: var(--bad); font-weight: 600; }
@media (max-width: 560px) { .row { grid-template-columns: 64px minmax(0, 1fr); } .tall { height: 150px; }
  h1 { font-size: 19px; } .axis span:nth-child(even) { display: none; } }
"""
