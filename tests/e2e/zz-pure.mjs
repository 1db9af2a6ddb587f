// pure Yjs: no server; docs exchange updates in random order per link (in order per sender)
import { Dice, dump, ROOTS, vectorText, complete } from './lib/yjs.js';
import * as Y from 'yjs';
import fs from 'node:fs';
const from = Number(process.argv[2]), ms = Number(process.argv[3]) * 1000;
const useUndo = process.argv[4] !== 'noundo';
let n = 0, bad = 0; const t0 = Date.now();
for (let seed = from; Date.now() - t0 < ms; seed++, n++) {
  const d = new Dice(seed);
  const N = 3 + d.below(3);
  const trace = [];
  const eds = Array.from({ length: N }, (_, i) => {
    const doc = new Y.Doc({ gc: d.chance(0.8) }); doc.clientID = 1 + Math.floor(d.random() * 2 ** 32 - 1);
    const roots = Object.entries(ROOTS).map(([r, g]) => doc[g](r));
    const e = { doc, inbox: [], on: true, undo: useUndo && d.chance(0.5) ? new Y.UndoManager(roots, { captureTimeout: d.chance(0.5) ? 0 : 1e9 }) : null };
    return e;
  });
  // server: a plain Y.Doc (like the reference)
  const srv = new Y.Doc();
  const toServer = (u, who) => {
    Y.applyUpdate(srv, u, who);
  };
  srv.on('update', (u, who) => eds.forEach((e) => e !== who && e.on && e.inbox.push(u)));
  eds.forEach((e) => e.doc.on('update', (u, o) => { if (o !== 'net' && e.on) toServer(u, e); }));
  const sync = (e) => { e.inbox.length = 0; e.on = true; toServer(Y.encodeStateAsUpdate(e.doc, Y.encodeStateVector(srv)), e); Y.applyUpdate(e.doc, Y.encodeStateAsUpdate(srv, Y.encodeStateVector(e.doc)), 'net'); };
  const steps = 150 + d.below(500);
  for (let i = 0; i < steps; i++) {
    const e = d.pick(eds), w = d.random();
    if (w < 0.03) { e.on = false; e.inbox.length = 0; }
    else if (w < 0.1) { if (!e.on) sync(e); }
    else if (w < 0.14) e.undo?.stopCapturing();
    else if (w < 0.25) e.doc.transact(() => [0, 1, 2].forEach(() => d.edit(e.doc)));
    else d.edit(e.doc, e.undo);
    const r = d.pick(eds); while (r.inbox.length && d.chance(0.7)) Y.applyUpdate(r.doc, r.inbox.shift(), 'net');
  }
  eds.forEach(sync);
  for (let k = 0; k < 5; k++) eds.forEach((e) => { while (e.inbox.length) Y.applyUpdate(e.doc, e.inbox.shift(), 'net'); });
  eds.forEach(sync); eds.forEach((e) => { while (e.inbox.length) Y.applyUpdate(e.doc, e.inbox.shift(), 'net'); });
  const ds = eds.map((e) => dump(e.doc));
  if (!ds.every((x) => x === ds[0]) || !eds.every((e) => vectorText(e.doc) === vectorText(eds[0].doc))) { bad++; console.log('DIVERGED', seed, 'undo', eds.map((e) => !!e.undo).join()); }
  eds.forEach((e) => { e.undo?.destroy(); e.doc.destroy(); });
}
console.log({ from, n, bad });
process.exit();
