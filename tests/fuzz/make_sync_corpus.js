// Writes the seeds of fuzz_sync to corpus/sync: `node tests/fuzz/make_sync_corpus.js`.
// Each is a run of updates (length, bytes), then a length of 0 and a state
// vector. Files of other names there, such as those of crashes, are left alone.
//
// SPDX-License-Identifier: MIT
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import * as Y from 'yjs'

const folder = path.join(path.dirname(fileURLToPath(import.meta.url)), 'corpus', 'sync')
fs.mkdirSync(folder, { recursive: true })

function uint (n) {
  const bytes = []
  for (; n > 127; n = Math.floor(n / 128)) bytes.push(128 | n % 128)
  return [...bytes, n]
}

function put (name, updates, sv = [0]) {
  fs.writeFileSync(path.join(folder, name), Buffer.from([
    ...updates.flatMap(u => [...uint(u.length), ...u]), 0, ...sv]))
}

// What a client with this id sends while `edit` works on its document.
function updates (id, edit, start = []) {
  const doc = new Y.Doc()
  const sent = []
  doc.clientID = id
  start.forEach(u => Y.applyUpdate(doc, u))
  doc.on('update', u => sent.push(u))
  edit(doc)
  return sent
}

const typed = updates(1, doc => {
  const t = doc.getText('t')
  for (const c of 'hello 😀 ä') t.insert(t.length, c)
  t.delete(2, 3)
  t.insert(1, 'XY')
})
put('typed', typed, [1, 1, 3])
put('typed-backwards', [...typed].reverse())
put('with-gaps', typed.filter((u, i) => i % 3 !== 1), [1, 1, 2])
put('all-at-once', [Y.mergeUpdates(typed)], [1, 1, 7])
put('twice', [...typed.slice(0, 5), ...typed.slice(2, 8)])

const rich = updates(2 ** 31 + 5, doc => {
  const t = doc.getText('t')
  t.insert(0, 'some text')
  t.format(2, 4, { b: true, l: { u: 1 } })
  t.format(3, 2, { b: null })
  t.insertEmbed(1, { img: [1, 'x'] })
})
put('rich-text', rich)

put('map', updates(3, doc => {
  const m = doc.getMap('m')
  for (const v of [1, -0, 0.5, 1e9, 2 ** 40, 'x', null, undefined, true, 5n, [1, [2]],
    { a: { b: 1 } }, new Uint8Array([0, 255])]) m.set('k', v)
  m.set('doc', new Y.Doc({ guid: 'g', meta: 1 }))
  m.delete('k')
}), [1, 3, 9])

const nested = updates(4, doc => {
  const a = doc.getArray('a')
  const inner = new Y.Array()
  a.insert(0, [inner, 1, 2, 3])
  inner.insert(0, [new Y.Text('deep'), new Y.Map([['k', 1]])])
  const x = doc.getXmlFragment('x')
  const p = new Y.XmlElement('p')
  x.insert(0, [p, new Y.XmlHook('h')])
  p.insert(0, [new Y.XmlText('t')])
  a.delete(0, 2)
  x.delete(0, 1)
})
put('deleted-types', nested)
put('two-clients', [...nested, ...updates(9, doc => {
  doc.getArray('a').insert(1, ['x', 'y'])
  doc.getArray('a').delete(0, 1)
}, nested)], [2, 9, 1, 4, 3])

// ----- by hand ---------------------------------------------------------------

const text = s => [...uint(Buffer.from(s).length), ...Buffer.from(s)]
put('nothing', [[0, 0]])
put('deletes-only', [[0, 2, 5, 2, 0, 3, 9, 1, 1, 1, 4, 4], [0, 1, 5, 1, 2, 8]])
put('json-kind', [[1, 1, 1, 0, 2, 1, ...text('t'), 3, ...text('null'), ...text('{"a":1}'),
  ...text('undefined'), 1, 1, 1, 1, 1]], [1, 1, 1])
put('a-client-twice', [[2, 1, 1, 2, 0x84, 1, 1, ...text('c'), 1, 1, 0, 4, 1, ...text('t'),
  ...text('ab'), 0]])
put('gc-skip', [[1, 4, 1, 0, 0, 5, 10, 3, 0, 2, 0, 1, 0], [1, 1, 1, 4, 0, 6, 0]])
put('half-a-pair', [[1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 4, 1, ...text('t'), ...text('😀😀'),
  1, 1, 1, 2, 1]], [1, 1, 3])
put('padded', [[0x81, 0, 1, 0x81, 0, 0, 4, 1, ...text('t'), ...text('a'), 0]])
put('a-circle', [[2, 1, 2, 0, 7, 0, 1, 0, 0, 1, 1, 0, 7, 0, 2, 0, 0, 0]])
put('long', [[1, 1, 1, 0, 4, 1, ...text('t'), ...text('0123456789'.repeat(30)),
  1, 1, 3, 0, 5, 20, 100, 250, 3]], [1, 1, 40])
put('awareness', [[2, 5, 1, 2, 123, 125, 6, 3, 4, 110, 117, 108, 108]])
