// SPDX-License-Identifier: MIT
// Goal: Hocuspocus providers, which come to the bare address /yjs and name their
// documents inside, and y-websocket providers edit the same documents.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { HocuspocusProvider, HocuspocusProviderWebsocket } from '@hocuspocus/provider';
import WebSocket from 'ws';
import * as Y from 'yjs';
import { SLOW } from './lib/server.js';
import { converged, join, ours, startYjs, synced, until } from './lib/yjs.js';

const LEFT_OUT = 'this server has no documents for Hocuspocus at the bare /yjs';

async function start(t) {
    const server = await startYjs(t);
    const { status, socket } = await server.handshake('/yjs');
    socket.destroy();
    if (status !== 101)
        t.skip(LEFT_OUT);
    return status === 101 ? server : null;
}

// A connection, and documents on it.
function line(t, server) {
    const socket = new HocuspocusProviderWebsocket({ url: `${server.url}/yjs`,
        WebSocketPolyfill: WebSocket });
    t.after(() => socket.destroy());
    return socket;
}
function open(t, websocketProvider, name) {
    const document = new Y.Doc();
    const provider = new HocuspocusProvider({ websocketProvider, name, document,
        token: 'none' });
    provider.attach();
    provider.doc = document;
    provider.text = document.getText('text');
    t.after(() => {
        provider.destroy();
        document.destroy();
    });
    return provider;
}

test('two Hocuspocus editors and one of y-websocket converge', ours, async (t) => {
    const server = await start(t);
    if (!server)
        return;
    const a = open(t, line(t, server), 'notes');
    const b = open(t, line(t, server), 'notes');
    const c = join(t, server, 'notes');
    await synced(c);
    await until(() => a.isSynced && b.isSynced);
    a.text.insert(0, 'from a ');
    b.text.insert(0, 'from b ');
    c.text.insert(0, 'from c ');
    await converged([a, b, c]);
    assert.equal(c.text.length, 21);
    await until(() => !a.hasUnsyncedChanges && !b.hasUnsyncedChanges, 5000 * SLOW,
        'their edits were never acknowledged');
    a.awareness.setLocalStateField('user', { name: 'A' });
    await until(() => c.awareness.getStates().get(a.doc.clientID)?.user?.name === 'A');
    const late = open(t, line(t, server), 'notes');
    await until(() => late.isSynced);
    await converged([late, c]);
});

test('several documents share one socket', ours, async (t) => {
    const server = await start(t);
    if (!server)
        return;
    const socket = line(t, server);
    const [one, two] = [open(t, socket, 'one'), open(t, socket, 'two')];
    const [far, near] = [join(t, server, 'one'), join(t, server, 'two')];
    await until(() => one.isSynced && two.isSynced && far.synced && near.synced);
    one.text.insert(0, 'for one');
    near.text.insert(0, 'for two');
    await converged([one, far]);
    await converged([two, near]);
    assert.equal(far.text.toString(), 'for one');
    assert.equal(two.text.toString(), 'for two');
});
