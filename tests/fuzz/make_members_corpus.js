// Writes the seeds of fuzz_members to corpus/members:
// `node tests/fuzz/make_members_corpus.js`. Each is a byte of settings, then
// events as fuzz_members.c draws them. Files of other names there, such as those
// of crashes, are left alone.
//
// SPDX-License-Identifier: MIT
import fs from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import * as Y from 'yjs'

const folder = path.join(path.dirname(fileURLToPath(import.meta.url)), 'corpus', 'members')
fs.mkdirSync(folder, { recursive: true })

// ----- settings and events -----------------------------------------------------

const DISK = 1, ALWAYS = 2, FULL = 4, KEEP = 8, COALESCE = 16, LITTLE = 32, SHORT = 64, BRIEF = 128
const event = (z, member, x) => z | member << 3 | x << 5

const come = (m, doc = 0) => event(0, m, doc)
const comeSilent = (m, doc = 0) => event(0, m, 2 + doc)
const bye = m => event(0, m, 4)
const lost = m => event(0, m, 6)
const reset = m => event(0, m, 7)
// An update made by kind: 0 typing, 1 ahead, 2 over what is there, 3 GC,
// 4 a pair, 5 deleted, 6 a type, 7 deletes only.
const edit = (m, kind, shape, ...more) => [event(1, m, kind), shape, ...more]
const reply = (m, kind, shape, ...more) => [event(2, m, kind), shape, ...more]
const raw = (m, how, bytes) => [event(3, m, how), bytes.length, ...bytes]
const wait = x => event(4, 0, x) // 0, 1, 50, 1000, 2000, 5000, 11000, 26000 ms
const disk = (how, ...more) => [event(5, 0, how), ...more]
const heal = 0, full = 1, unsynced = 3, closed = 4, nameless = 5, uncut = 6, dry = 7
const window = (m, x) => event(6, m, x) // 0, 1, 7, 100, 4096, 20000, 100000, all
const thread = event(7, 3, 0)
const askAll = m => event(7, m, 0)
const askRest = m => event(7, m, 1)
const answer = m => event(7, m, 2)
const aware = (m, shape) => [event(7, m, 3), shape]
const query = m => event(7, m, 5)
// So many keystrokes; or so many times 2 KiB at once, up to 32.
const type = (m, n) => n < 32 ? [event(7, m, 7), n] : [type(m, 31), type(m, n - 31)]
const paste = (m, n) => [event(7, m, 7), 223 + n]

function put (name, settings, ...events) {
  fs.writeFileSync(path.join(folder, name), Buffer.from([settings, ...events.flat(9)]))
}

const all = [come(0), come(1), come(2), wait(1)]

// What an editor with this id sends while `work` goes on.
function updates (id, work, start = []) {
  const doc = new Y.Doc()
  const sent = []
  doc.clientID = id
  start.forEach(u => Y.applyUpdate(doc, u))
  doc.on('update', u => sent.push(u))
  work(doc)
  return sent
}

// ----- seeds ---------------------------------------------------------------------

put('typing', KEEP, all, edit(0, 0, 0, 4), wait(1), edit(1, 0, 16, 7), wait(1), edit(0, 0, 0, 2), wait(5))
put('typing-on-a-disk', DISK, all, edit(0, 0, 0, 4), wait(1), edit(1, 0, 16, 7), wait(3), thread, wait(1))
put('always', DISK | ALWAYS, all, edit(0, 0, 0, 4), wait(1), thread, wait(1), edit(1, 0, 16, 7), wait(1), thread, thread)
put('at-once', KEEP, all, edit(0, 0, 0, 4), edit(1, 0, 0, 7), edit(0, 2, 0, 9), edit(1, 2, 0, 9), wait(1))
put('deletes', FULL, all, edit(0, 0, 0, 20), wait(1), edit(1, 7, 4, 0x0b, 0x23), wait(1), askAll(2), wait(5), askAll(2))
put('deletes-kept', KEEP, all, edit(0, 0, 0x24, 20, 9, 0x21), wait(1), edit(1, 5, 0x14, 3, 0x23), wait(5))
put('gaps', DISK | KEEP, all, edit(0, 1, 0, 4), edit(0, 1, 0, 3), wait(1), edit(1, 2, 0, 30), wait(5), answer(0), wait(1))
put('pairs-cut', KEEP, all, edit(0, 4, 0, 3), edit(1, 2, 0, 6), edit(1, 4, 0, 1), wait(1), askRest(2))
put('types', FULL, all, edit(0, 6, 2, 1, 1, 1), edit(1, 0, 2, 3, 3, 3), edit(1, 7, 4, 0, 8), wait(5), askAll(2))
put('late', KEEP, come(0), wait(1), edit(0, 0, 0, 4), wait(1), come(1), wait(1), come(2), edit(1, 0, 32, 4), wait(1))
put('slow-join', KEEP, come(0), wait(1), type(0, 200), wait(1), come(2), window(2, 3), wait(1), type(0, 250),
  wait(1), window(2, 5), type(0, 250), wait(1), window(2, 7), wait(1))
put('pinned', DISK | KEEP, come(0), wait(1), type(0, 100), wait(5), come(2), window(2, 3), wait(1), edit(0, 0, 0, 4),
  wait(5), come(1), wait(1), edit(0, 0, 0, 4), wait(5), thread, lost(2), wait(1), thread)
put('overtaken', KEEP, all, window(2, 0), [...Array(9)].map(() => [type(0, 255), wait(1)]), window(2, 7), wait(1))
put('coalesce', KEEP | COALESCE, all, edit(0, 0, 0, 4), wait(1), edit(0, 0, 0, 4), wait(2), edit(1, 0, 16, 4), bye(1), wait(2))
put('left-behind', KEEP, all, aware(0, 0x24), aware(1, 0x48), wait(1), reset(0), wait(1), lost(1), wait(1))
put('cursors', 0, all, aware(0, 0x24), wait(1), query(2), wait(1), aware(0, 0x25), wait(1), aware(1, 0x24), wait(1),
  wait(7), wait(6))
put('cursor-comes-back', 0, all, aware(0, 0x24), wait(1), lost(0), wait(1), come(0), aware(0, 0x24), wait(1), query(2))
put('reader-writes', KEEP, all, edit(2, 0, 0, 4), wait(1), edit(0, 0, 0, 4), wait(4), edit(2, 0, 0, 4))
put('disk-full', DISK, all, edit(0, 0, 0, 4), wait(1), disk(full), edit(0, 0, 0, 4), wait(1), edit(1, 0, 16, 4),
  edit(1, 7, 4, 3), wait(4), disk(heal), wait(4), answer(0), answer(1), wait(1))
put('disk-half-full', DISK | KEEP, all, disk(2, 60), edit(0, 0, 0, 4), wait(1), edit(0, 0, 0, 20), wait(1),
  edit(0, 0, 0, 20), wait(4), disk(heal), wait(4), wait(4))
put('disk-unsynced', DISK | ALWAYS, all, edit(0, 0, 0, 4), wait(1), thread, wait(0), disk(unsynced), edit(0, 0, 0, 4),
  wait(1), thread, wait(1), thread, wait(4), disk(heal), wait(4), thread, wait(1), thread, wait(4), answer(0))
put('disk-nameless', DISK, disk(nameless), all, edit(0, 0, 0, 4), wait(1), disk(heal), wait(4), thread, wait(1))
put('disk-closed', DISK, disk(closed), all, edit(0, 0, 0, 4), wait(1), disk(heal), come(0), come(1), edit(0, 0, 0, 4), wait(4))
put('disk-uncut', DISK | KEEP, all, edit(0, 0, 0, 4), wait(1), disk(2, 5), disk(uncut), edit(0, 0, 0, 4), wait(4), disk(heal),
  wait(4), thread, wait(1), thread, wait(4), edit(0, 0, 0, 4))
put('memory-dry', DISK, all, edit(0, 0, 0, 4), wait(1), disk(dry), type(0, 200), wait(1), come(3), askAll(2), wait(4),
  disk(heal), wait(4))
put('taken-back-with-many-clients', DISK | KEEP, all, [...Array(40).keys()].map(i =>
  raw(0, 4, [1, 1, 20 + i, 0, 4, 1, 1, 116, 1, 97, 0])), wait(1), wait(5), thread, disk(full), disk(dry),
raw(0, 4, [1, 1, 20, 1, 132, 20, 0, 1, 97, 0]), wait(1), wait(4), disk(heal), wait(4))
put('memory-little', LITTLE, all, [...Array(6)].map(() => [type(0, 255), type(1, 255), wait(1)]), come(3, 1), wait(5))
put('document-full', SHORT, all, type(0, 60), wait(1), edit(1, 0, 16, 4), edit(1, 7, 4, 0x83), wait(4), wait(4), answer(1))
put('message-too-long', BRIEF, all, raw(0, 5, [...Array(60)].map(() => 1)), wait(1), come(0), answer(0), wait(1))
const pastes = n => [...Array(n)].map(() => [paste(0, 32), wait(1)])
put('blocks', DISK | KEEP, all, window(2, 4), pastes(3), window(1, 0), pastes(5), window(1, 7), lost(2), wait(1))
put('blocks-many-at-once', KEEP, all, window(1, 0), window(2, 0), [...Array(6)].map(() => paste(0, 25)), wait(1), wait(4))
put('merged-aside', DISK | KEEP, all, pastes(20), edit(1, 0, 16, 4), wait(1), edit(1, 0, 16, 4), wait(4), thread, wait(1), edit(1, 0, 16, 4),
  wait(5), askAll(2), thread, wait(1), askAll(1), wait(5), thread, thread)
put('in-pieces', KEEP, come(0), wait(1), pastes(66), wait(5), thread, come(2), window(2, 6), wait(1), edit(0, 0, 0, 4), wait(1),
  window(2, 7), wait(1), lost(0), wait(5), thread, wait(1))
put('compacted', DISK, all, [...Array(12)].map(() => [type(0, 255), wait(1)]), bye(0), bye(1), bye(2), wait(2), thread,
  come(0), wait(1), edit(0, 0, 0, 4), thread, wait(2), thread)
put('waits-and-is-gone', DISK | ALWAYS | KEEP, all, wait(1), wait(1), disk(dry), edit(0, 0, 8, 21, 0x23, 0x0b), wait(1), reset(0), wait(1),
  disk(heal), come(3), wait(1), wait(1))
put('two-documents', DISK | LITTLE, come(0), come(1, 1), wait(1), edit(0, 0, 0, 4), edit(1, 0, 0, 4), wait(1), bye(0), bye(1),
  wait(4), thread, wait(1), come(0, 1), come(1), wait(1), edit(0, 2, 0, 9))
put('silent-member', KEEP, comeSilent(0), come(1), wait(1), edit(1, 0, 0, 4), edit(0, 0, 16, 4), wait(1), askAll(0), wait(1))
put('answers', KEEP, all, edit(0, 0, 0, 4), wait(1), answer(0), answer(1), reply(1, 7, 4, 3), reply(1, 0, 0, 3), wait(1))
put('malformed', 0, all, raw(0, 4, [1, 2, 3]), raw(1, 6, [1, 1, 1, 1, 120]), wait(1), come(0), raw(0, 7, [9, 9]), wait(1))
put('watchdogs', 0, all, wait(6), wait(7), wait(7), wait(7))

const typed = updates(3, doc => {
  const t = doc.getText('t')
  for (const c of 'hello 😀') t.insert(t.length, c)
  t.delete(1, 3)
  t.format(0, 2, { b: true })
})
const mapped = updates(4, doc => {
  const m = doc.getMap('m')
  m.set('k', [1, { a: null }])
  m.set('t', new Y.Text('x'))
  m.delete('t')
}, typed)
put('an-editor', DISK | KEEP, all, typed.map(u => [raw(0, 4, u), wait(1)]), mapped.map(u => [raw(1, 4, u), wait(1)]),
  askAll(2), wait(5), thread, wait(1))
put('an-editor-merged', FULL, all, raw(0, 2, [...Y.mergeUpdates([...typed, ...mapped])]), wait(5),
  raw(1, 0, [1, 3, 4]), wait(1))
