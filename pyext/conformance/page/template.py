"""The page's frame and style sheet: `$name` is filled in by `page.render`.  Nothing is fetched, no script runs."""

from __future__ import annotations

from string import Template

STYLE = """
:root {
  --paper: #fff; --ink: #1c2128; --faint: #667080; --rule: #d5dae1; --band: #f4f6f8;
  --ok: #dff3e4; --ok-ink: #14632c; --fail: #c9252d; --fail-ink: #fff;
  --unsupported: #ece8f6; --unsupported-ink: #51408a; --skipped: #eef0f3; --skipped-ink: #667080;
  --c0: #55606e; --c1: #1668c1; --c2: #b4580e; --c3: #0d8566; --c4: #8a3fa0; --c5: #a8274a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --ink: #e4e8ee; --faint: #98a2b0; --rule: #333a44; --band: #1c2027;
    --ok: #173a23; --ok-ink: #8fdba6; --fail: #d93a42;
    --unsupported: #302a47; --unsupported-ink: #c0b2ee; --skipped: #242930; --skipped-ink: #98a2b0;
    --c0: #a0abba; --c1: #6ab0f5; --c2: #f0a262; --c3: #55cfae; --c4: #cf90e2; --c5: #f08aa4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 24px 28px 80px; max-width: 1240px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
}
h1 { font-size: 25px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 44px 0 8px; }
h3 { font-size: 15px; margin: 22px 0 4px; }
p { margin: 4px 0 12px; max-width: 100ch; }
a { color: inherit; }
code {
  font: 13px ui-monospace, "DejaVu Sans Mono", monospace; background: var(--band); padding: 1px 5px;
  border-radius: 4px;
}
table { border-collapse: collapse; }
th, td { text-align: left; padding: 3px 12px 3px 0; vertical-align: top; }
.faint { color: var(--faint); }
.wide { overflow-x: auto; }
.totals { display: flex; flex-wrap: wrap; gap: 8px; margin: 14px 0 6px; }
.tag { padding: 2px 10px; border-radius: 5px; font-weight: 600; white-space: nowrap; }

.ok { background: var(--ok); color: var(--ok-ink); }
.FAIL { background: var(--fail); color: var(--fail-ink); font-weight: 700; }
.unsupported { background: var(--unsupported); color: var(--unsupported-ink); }
.skipped { background: var(--skipped); color: var(--skipped-ink); }

.reasons .tag { font-size: 13px; padding: 0 6px; }
.failures { padding: 0; list-style: none; }
.failures li {
  border-left: 5px solid var(--fail); background: var(--band); padding: 5px 12px; margin: 5px 0;
  overflow-wrap: anywhere;
}
.environment { column-width: 370px; column-gap: 36px; font-size: 13.5px; }
.environment div {
  display: flex; gap: 10px; break-inside: avoid; border-bottom: 1px solid var(--rule); padding: 2px 0;
}
.environment b { flex: 0 0 165px; font-weight: 500; color: var(--faint); }
.environment span { overflow-wrap: anywhere; }

.matrix th { font-size: 13px; font-weight: 600; padding: 4px 10px; border-bottom: 2px solid var(--rule); }
.matrix td { padding: 6px 10px; border: 3px solid var(--paper); min-width: 100px; }
.matrix td small { display: block; opacity: .85; }
.matrix td.name { white-space: nowrap; }

.cases { font-size: 13px; }
.cases summary, .cases .head { display: grid; gap: 2px; }
.cases .head { color: var(--faint); }
.cases .head + .head { border-bottom: 2px solid var(--rule); }
.cases .head b { font-weight: 600; color: var(--ink); border-left: 2px solid var(--rule); padding-left: 6px; }
.cases summary { cursor: pointer; padding: 1px 0; list-style: none; }
.cases summary::-webkit-details-marker { display: none; }
.cases summary:hover { background: var(--band); }
.cases i { font-style: normal; padding: 2px 4px; }
.cases summary > i::before { content: "\\25B8"; display: inline-block; width: 16px; color: var(--faint); }
.cases details[open] > summary > i::before { content: "\\25BE"; }
.cases span { padding: 2px 4px; border-radius: 4px; text-align: center; font-variant-numeric: tabular-nums; }
.inside { margin: 4px 0 14px 20px; padding: 8px 14px; border-left: 3px solid var(--rule); background: var(--band); }
.inside { width: 0; min-width: calc(100% - 20px); } /* as wide as the list, whatever is inside */
.inside p { margin: 2px 0 6px; max-width: 130ch; }
.inside td, .inside th {
  padding: 1px 14px 1px 0; font-size: 12.5px; font-variant-numeric: tabular-nums; white-space: nowrap;
}
.inside td.FAIL { padding: 1px 6px; border-right: 10px solid var(--band); }

svg { max-width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font-size: 12px; }
svg text.faint { fill: var(--faint); }
svg .axis { stroke: var(--rule); }
svg .bound { stroke: var(--fail); stroke-width: 1.5; }
svg .stripe { fill: var(--band); }
svg .broken { stroke: var(--fail); stroke-width: 3; }
.legend { font-size: 13px; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 2px 0 8px; }
.legend svg { display: inline; vertical-align: -2px; }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>steepest validate: $machine</title>
<style>$style</style>
</head>
<body>
<h1>steepest validate</h1>
<div>$machine <span class="faint">· $run</span></div>
<div class="totals">$totals</div>
<p>Every op runs its cases on every backend and is held against a float64 oracle and derived error bounds.
A percentage is the part of a bound that the worst figure used; above 100 % is a FAIL.</p>
$failures
<h2>Verdicts</h2>
<div class="wide">$matrix</div>
$reasons
<h2>Use of the error bounds</h2>
<p>Each mark is one case. To the right of the line the bound is broken; marks at the left edge used less than 3 %.
Results stored in 16 bits come near 100 % by rounding alone, which is most of their bound.</p>
<div class="wide">$overview</div>
$ops
<h2>Environment</h2>
<div class="environment">$environment</div>
<p class="faint">To get this page: <code>python -m steepest validate --html report.html</code>;
from a report: <code>python -m steepest validate --html report.html --from report.json</code></p>
</body>
</html>
""")
