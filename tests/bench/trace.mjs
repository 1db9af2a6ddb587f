// trace.mjs - the edits and documents of `make bench`, made by the real Yjs.
//
// SPDX-License-Identifier: MIT
//
//   node trace.mjs DIR                makes what is missing in DIR:
//     paper.bin    a recorded paper, one update for each of its edits
//     16k.bin 1m.bin 10m.bin   documents of that size, for preloading
//   node trace.mjs check FILE EDITS   is the update in FILE the paper after
//                                     EDITS edits?
//
// A .bin file is a row of updates, each behind its length (32 bits, little
// endian).  The paper comes from the folder COLLABD_TRACES, by default
// ../shared/traces beside the repository; without it says "skipped".
import { createWriteStream, existsSync, readFileSync, renameSync, statSync } from 'node:fs';
import { finished } from 'node:stream/promises';
import { fileURLToPath } from 'node:url';
import { gunzipSync } from 'node:zlib';
import * as Y from 'yjs';

const here = new URL('.', import.meta.url);
const traces = process.env.COLLABD_TRACES ?? fileURLToPath(new URL('../../../shared/traces', here));
const paper = `${traces}/automerge-paper.json.gz`;
const client = 0xc0ffee01; // five bytes as a varuint, as most ids are

const patches = () => JSON.parse(gunzipSync(readFileSync(paper))).txns.flatMap((t) => t.patches);

// Writes a file of updates: make() is given the function that takes one.
async function updates(file, make) {
  const out = createWriteStream(`${file}.new`);
  make((update) => {
    const length = Buffer.alloc(4);
    length.writeUInt32LE(update.length);
    out.write(length);
    out.write(update);
  });
  await finished(out.end());
  renameSync(`${file}.new`, file);
}

function typePaper(take) {
  const doc = new Y.Doc();
  const text = doc.getText('paper');
  doc.clientID = client;
  doc.on('update', take);
  for (const [position, deleted, inserted] of patches()) {
    doc.transact(() => {
      if (deleted) text.delete(position, deleted);
      if (inserted) text.insert(position, inserted);
    });
  }
}

// Twenty people who write words, delete a few letters, and move on now and
// then.  An update is about 32 KB; together they are as long as `size`.
function typeDocument(size, take) {
  const doc = new Y.Doc();
  const text = doc.getText('document');
  let seed = 1, written = 0, at = 0;
  const below = (n) => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return Math.floor((seed / 2 ** 32) * n);
  };
  const words = 'one word after the other fills the page until it is long enough '.repeat(2);
  const burst = () => {
    if (below(20) === 0) at = below(text.length + 1);
    if (below(5) === 0 && at + 10 < text.length) {
      text.delete(at, 1 + below(9));
      return;
    }
    const from = below(64);
    const word = words.slice(from, from + 2 + below(24));
    text.insert(at, word);
    at = Math.max(0, at + word.length - below(3));
  };
  doc.on('update', (update) => {
    written += update.length;
    take(update);
  });
  const bursts = Math.max(1, Math.min(800, size / 400));
  for (let turn = 0; written < size; turn++) {
    doc.clientID = client + 1 + (turn % 20);
    doc.transact(() => {
      for (let i = 0; i < bursts; i++) burst();
    });
  }
}

function check(file, edits) {
  const text = [];
  for (const [position, deleted, inserted] of patches().slice(0, edits)) {
    text.splice(position, deleted, ...inserted);
  }
  const doc = new Y.Doc();
  Y.applyUpdate(doc, readFileSync(file));
  if (doc.getText('paper').toString() !== text.join('')) {
    console.error(`trace.mjs: ${file} is not the paper after ${edits} edits`);
    process.exit(1);
  }
}

async function make(folder) {
  const wanted = {
    '16k.bin': (take) => typeDocument(16 << 10, take),
    '1m.bin': (take) => typeDocument(1 << 20, take),
    '10m.bin': (take) => typeDocument(10 << 20, take),
  };
  if (existsSync(paper)) {
    wanted['paper.bin'] = typePaper;
  } else {
    console.log(`skipped: there is no ${paper}`);
  }
  const changed = statSync(fileURLToPath(import.meta.url)).mtimeMs;
  for (const [name, write] of Object.entries(wanted)) {
    const file = `${folder}/${name}`;
    if (!existsSync(file) || statSync(file).mtimeMs < changed) await updates(file, write);
  }
}

if (process.argv[2] === 'check') {
  check(process.argv[3], Number(process.argv[4]));
} else {
  await make(process.argv[2]);
}
