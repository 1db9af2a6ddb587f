// SPDX-License-Identifier: MIT
// Goal: whatever several editors do to a document of whatever types, however
// often their lines break and the server is stopped or killed, in the end all of
// them and every newcomer have the same, before and after the server has put
// the document together anew.
//
// A run takes COLLABD_STORM_MS (30 s) and prints its seed; COLLABD_SEED
// repeats its dice (not its timing).

import assert from 'node:assert/strict';
import { mkdtempSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';
import * as Y from 'yjs';
import { SLOW } from './lib/server.js';
import {
    converged, dataFolder, Dice, dump, freePort, join, load, METRIC, REFERENCE,
    ROOTS, sameUnits, say, startYjs, synced, YClient,
} from './lib/yjs.js';

const DURATION = Number(process.env.COLLABD_STORM_MS ?? 30000);
const SEED = Number(process.env.COLLABD_SEED ?? Date.now() % 2 ** 31);

// ----- a server that comes and goes ----------------------------------------

class Host {
    restarts = { stop: 0, kill: 0 };
    merges = 0;
    compactions = 0;
    #busy = null;

    static async make(t, args) {
        const host = new Host();
        Object.assign(host, { t, args, port: await freePort() });
        await host.start();
        return host;
    }
    async start() {
        this.server = await startYjs(this.t,
            { listen: `127.0.0.1:${this.port}`, args: this.args });
    }
    // 'stop' or 'kill', and start again; one at a time.
    restart(how) {
        this.#busy ??= (async () => {
            this.restarts[how]++;
            await this.count();
            await this.server[how]({ keepClients: true });
            await pause(20);
            await this.start();
            this.#busy = null;
        })();
        return this.#busy;
    }
    ready() {
        return this.#busy;
    }
    async count() {
        const seen = REFERENCE ? {} : await this.server.metrics();
        this.merges += seen[METRIC.merges];
        this.compactions += seen[METRIC.compactions];
    }
}

// ----- one document and those who edit it ----------------------------------

class Editor {
    constructor(t, host, name, d) {
        this.d = d;
        this.provider = join(t, host, name, { gc: d.chance(0.8), maxBackoffTime: 200 });
        this.doc = this.provider.doc;
        this.kept = [];         // updates, for a repetition
        const roots = Object.entries(ROOTS).map(([root, get]) => this.doc[get](root));
        this.undo = d.chance(0.5) ? new Y.UndoManager(roots,
            { captureTimeout: d.chance(0.5) ? 0 : 1e9 }) : null;
        this.doc.on('update', (update, origin) => {
            if (origin !== this.provider && this.kept.length < 50)
                this.kept.push(update);
        });
    }

    act() {
        const { d, doc, undo, provider } = this;
        const what = d.random();
        if (what < 0.015)
            provider.ws?.terminate();
        else if (what < 0.03 && provider.shouldConnect)
            provider.disconnect();
        else if (what < 0.1)
            provider.connect();
        else if (what < 0.14)
            undo?.stopCapturing();
        else if (what < 0.25)
            doc.transact(() => [0, 1, 2].forEach(() => d.edit(doc)));
        else
            d.edit(doc, undo);
    }
}

// Sends what was sent before again, out of order, doubled and merged.
async function repeat(host, name, editor) {
    const { d, kept } = editor;
    if (kept.length < 3)
        return;
    const client = await YClient.enter(host.server, name);
    const some = Array.from({ length: 6 }, () => d.pick(kept));
    await client.send(say.update(Y.mergeUpdates(some.slice(0, 3))),
        ...some.slice(3).reverse().map(say.step2));
    await client.settled();
    await client.leave();
}

// Writes what each has, and the server, to files for the one who looks into it.
async function save(host, number, docs) {
    const dir = mkdtempSync(path.join(os.tmpdir(), 'collabd-diverged-'));
    const all = { server: await load(host.server, `storm-${number}`) };
    docs.forEach((doc, i) => (all[`client-${i}`] = doc));
    for (const [name, doc] of Object.entries(all)) {
        writeFileSync(path.join(dir, `${name}.update`), Y.encodeStateAsUpdate(doc));
        writeFileSync(path.join(dir, `${name}.json`), dump(doc));
    }
    return dir;
}

async function round(t, host, number, d) {
    const name = `storm-${number}`;
    d.bulk = d.chance(0.15) ? 100 : 1;      // so much that it is merged meanwhile
    const editors = Array.from({ length: 3 + d.below(3) }, () =>
        new Editor(t, host, name, d));
    const steps = 150 + d.below(500);
    const upheaval = !REFERENCE && d.chance(0.8) ? steps * d.random() : -1;
    const visits = [];

    for (let i = 0; i < steps; i++) {
        d.pick(editors).act();
        if (d.chance(0.08))
            await pause(d.below(12));
        if (d.chance(0.004))
            visits.push(repeat(host, name, d.pick(editors)).catch(() => {}));
        if (Math.floor(upheaval) === i)
            host.restart(d.pick(['stop', 'kill']));
        // All leave: the last one's going makes the server put it together.
        if (d.chance(0.004)) {
            editors.forEach((e) => e.provider.disconnect());
            await pause(30);
            editors.forEach((e) => d.chance(0.7) && e.provider.connect());
        }
    }
    await host.ready();
    await Promise.all(visits);

    const check = async (late) => {
        editors.forEach((e) => e.provider.connect());
        await Promise.all(editors.map((e) => synced(e.provider, 20000 * SLOW)));
        const all = [...editors.map((e) => e.doc), ...late.map((p) => p.doc)];
        await converged(all, 20000 * SLOW);
    };
    const newcomers = [];
    const newcomer = async (gc) => {
        const p = join(t, host, name, { gc, maxBackoffTime: 200 });
        newcomers.push(p);
        await synced(p, 20000 * SLOW);
        return p;
    };
    await check([]);
    await check([await newcomer(true), await newcomer(false)]);
    newcomers.forEach((p) => p.disconnect());

    // Everyone goes; a document that nobody holds comes back from its keep.
    editors.forEach((e) => e.provider.disconnect());
    if (!REFERENCE && d.chance(0.5))
        await host.restart(d.pick(['stop', 'kill']));
    else
        await pause(50);
    const alone = await newcomer(d.chance(0.5));
    await converged([editors[0].doc, alone.doc], 20000 * SLOW);

    // And all edit on from what the server made of it.
    for (let i = 0; i < 30; i++)
        d.pick([alone.doc, ...editors.map((e) => e.doc)].map((doc) => () =>
            d.edit(doc)))();
    await check([alone, await newcomer(true)]);
    const size = Y.encodeStateAsUpdate(alone.doc).length;
    [...editors.map((e) => e.provider), ...newcomers].forEach((p) => p.leave());
    return { editors: editors.length, steps, size };
}

test(`a storm of editors converges (seed ${SEED})`, async (t) => {
    t.diagnostic(`COLLABD_SEED=${SEED}`);
    const host = await Host.make(t, ['--data', dataFolder(t),
        '--max-clients', '1000']);
    let rounds = 0, steps = 0, bytes = 0, ambiguous = 0;
    for (const end = Date.now() + DURATION; Date.now() < end; rounds++) {
        const seed = (SEED + rounds) % 2 ** 31;
        try {
            const done = await round(t, host, rounds, new Dice(seed));
            steps += done.steps;
            bytes += done.size;
        } catch (error) {
            if (error.docs && sameUnits(error.docs)) {
                ambiguous++;
                continue;
            }
            if (error.docs)
                t.diagnostic(`what they have is in ${await save(host, rounds, error.docs)}`);
            error.message = `round ${rounds} (COLLABD_SEED=${seed}): ${error.message}` +
                (REFERENCE ? '' : `\n${host.server.log.slice(-20).join('\n')}`);
            throw error;
        }
    }
    await host.count();
    t.diagnostic(`${rounds} rounds, ${steps} steps, documents of ` +
        `${Math.round(bytes / rounds)} bytes, ${host.restarts.stop} restarts, ` +
        `${host.restarts.kill} kills, ${host.merges} merges, ` +
        `${host.compactions} compactions; ${ambiguous} that Yjs itself shows in ` +
        'several ways');
    assert.ok(rounds > 1 && ambiguous <= 1 + rounds / 50);
    assert.ok(REFERENCE || (host.merges > 0 && host.compactions > 0));
});
