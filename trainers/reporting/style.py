"""Style sheet and script of a page. The colours of lines are Okabe and Ito's, told apart by most colour-blind readers."""

# Text, muted text, background, raised background, rule, warning; then eight lines' colours, lighter ones in the dark.
STYLE = """
:root{color-scheme:light dark;--t:#1b1f24;--m:#59636e;--b:#fff;--r:#f4f6f8;--l:#d4d9df;--w:#a40e26;--wb:#fff0f0;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b3457f;--c4:#8a6d00;--c5:#3f8fc4;--c6:#5b4db0;--c7:#555}
@media(prefers-color-scheme:dark){:root{--t:#e3e7ec;--m:#9aa4af;--b:#14171b;--r:#1e2329;--l:#3a424b;--w:#ff8f8f;--wb:#34191c;
--c0:#56b4e9;--c1:#f0884d;--c2:#3fc79a;--c3:#e08fbb;--c4:#e6c229;--c5:#9bd0f0;--c6:#a99cf0;--c7:#bbb}}
*{box-sizing:border-box}
body{margin:0;background:var(--b);color:var(--t);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;line-height:1.2;margin:.4em 0}
h2{font-size:1.25rem;margin:1.8em 0 .5em;border-bottom:1px solid var(--l)}
h3{font-size:1rem;margin:1em 0 .4em}
h4{font-size:.9rem;margin:0 0 .2em;font-weight:600}
h1,h3,h4,p,figcaption{overflow-wrap:anywhere}
.summary{font-size:1.15rem;margin:.3em 0 1em}
.note{background:var(--r);border-left:4px solid var(--c0);padding:.5em .8em;margin:.6em 0}
.warning{background:var(--wb);border-color:var(--w)}.warning strong{color:var(--w)}
.wide{overflow-x:auto;margin:0 0 .8em}.caption{margin:.8em 0 .2em}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{text-align:left;padding:.35em .7em;border-bottom:1px solid var(--l);vertical-align:top}
td{min-width:4.5em;overflow-wrap:break-word}td:not(.number){max-width:24em}td.long{min-width:15em}th{white-space:nowrap}td.number{white-space:nowrap;font-variant-numeric:tabular-nums}
small{color:var(--m)}
figure{margin:0}figcaption,.caption,.empty{color:var(--m);font-size:.85rem}
.plot{display:inline-block;width:min(100%,500px);margin:0 20px 1em 0;vertical-align:top}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--l);fill:none;stroke-width:1}.axis{stroke:var(--m);fill:none}
.reference{stroke:var(--m);fill:none;stroke-dasharray:5 4}
.tick,.label{font-size:12px;fill:var(--m)}.label{fill:var(--t)}.over{paint-order:stroke;stroke:var(--b);stroke-width:4px}.end{text-anchor:end}.mid{text-anchor:middle}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.band{opacity:.16}
.strip{fill:transparent}.strip:hover{fill:var(--t);fill-opacity:.08}
.legend{display:flex;flex-wrap:wrap;gap:.2em 1.2em;font-size:.85rem}.legend i{display:inline-block;width:1.4em;height:.2em;
margin-right:.4em;vertical-align:middle}
.row>div{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,240px),1fr));gap:12px;align-items:start}
.row figure{max-width:640px}.row button{font:inherit;font-size:.85rem;margin:0 0 .5em}
video,img{display:block;width:100%;height:auto;background:var(--r)}
details{margin:.8em 0}summary{cursor:pointer}pre{overflow-x:auto;background:var(--r);padding:.8em;font-size:.8rem}
@media print{.strip,.row button{display:none}}
""" + "".join(f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.k{i}{{background:var(--c{i})}}" for i in range(8))

# Clips of a row start together, and play only while they are seen; without the script each has its own controls.
SCRIPT = """
for(const row of document.querySelectorAll('.together')){
const clips=[...row.querySelectorAll('video')];if(!clips.length)continue;
const start=()=>clips.forEach(v=>{v.currentTime=0;v.play().catch(()=>{})});
const button=document.createElement('button');button.textContent='Play together from the start';button.onclick=start;
row.querySelector('h3').after(button);
if(matchMedia('(prefers-reduced-motion: reduce)').matches)continue;
new IntersectionObserver(seen=>seen.forEach(e=>e.isIntersecting?start():clips.forEach(v=>v.pause())),{threshold:.3})
.observe(row.querySelector('div'))}
"""
