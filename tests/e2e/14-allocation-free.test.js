// SPDX-License-Identifier: MIT
//
// Goal: between receive and send nothing allocates, and a message is copied
// once, into the ring, however many members there are. The allocator's calls
// are counted by a preloaded library over more than 100,000 deliveries.

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { startServer } from './lib/server.js';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const MEMBERS = 50, MESSAGES = 2200, SIZE = 64;

test('over 100,000 deliveries nothing is allocated or freed', async (t) => {
    if (process.env.COLLABD)
        return t.skip('the sanitizers allocate by themselves');
    const dir = mkdtempSync(path.join(tmpdir(), 'collabd-'));
    t.after(() => rmSync(dir, { recursive: true }));
    const counts = path.join(dir, 'allocs');
    const library = path.join(dir, 'allocs.so');
    const made = spawnSync('cc', ['-std=c11', '-O2', '-fPIC', '-shared', '-o',
        library, path.join(ROOT, 'tests/bench/allocs.c'), '-ldl'],
    { encoding: 'utf8' });
    assert.equal(made.status, 0, made.stderr);

    const server = await startServer(t, { env: { ALLOCS: counts, LD_PRELOAD: library } });
    const [sender, ...members] = await Promise.all(Array.from({ length: MEMBERS + 1 },
        () => server.connect('/ws/room')));
    let heard = 0, done;
    const all = new Promise((resolve) => (done = resolve));
    members.forEach((peer) => (peer.onFrame = () => {
        if (++heard === MEMBERS * MESSAGES)
            done();
    }));
    const before = readFileSync(counts), metrics = await server.metrics();
    const start = readFileSync(counts);
    assert.deepEqual(start, before, 'a request allocates');
    assert.ok(before.readBigUInt64LE(0) > 0n, 'the library counts nothing');
    for (let i = 0; i < MESSAGES; i++)
        await sender.binary(Buffer.alloc(SIZE, i));
    await all;
    assert.deepEqual(readFileSync(counts), before);

    const after = await server.metrics();
    const grown = (name) => after[name] - metrics[name];
    assert.equal(grown('collabd_messages_out_total'), MEMBERS * MESSAGES);
    assert.ok(MEMBERS * MESSAGES > 100000);
    // A message that the end of a receive buffer (4 KiB) cuts is put together
    // first: that is a second copy, for one in 4096 / 70 at most.
    const cut = grown('collabd_assembled_total');
    assert.ok(cut <= MESSAGES / 50, `${cut} messages were cut`);
    assert.equal(grown('collabd_copied_bytes_total'), (MESSAGES + cut) * SIZE,
        'each payload byte is copied once, for all members together');
});
