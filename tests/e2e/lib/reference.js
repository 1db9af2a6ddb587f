// SPDX-License-Identifier: MIT
// The reference server of y-websocket, from npm, on a free port of 127.0.0.1
// with its documents at /yjs/NAME, as a program. It shows that a test asks what
// others do as well: COLLABD_REFERENCE=1 node --test tests/e2e/50-yjs.test.js

import http from 'node:http';
import { setupWSConnection } from '@y/websocket-server/utils';
import { WebSocketServer } from 'ws';

const sockets = new WebSocketServer({ noServer: true });
const server = http.createServer((_request, response) => response.end('okay'));

server.on('upgrade', (request, socket, head) => {
    const name = request.url.split('?')[0].replace(/^\/yjs\//, '');
    sockets.handleUpgrade(request, socket, head, (ws) =>
        setupWSConnection(ws, request, { docName: name }));
});
server.listen(Number(process.argv[2] ?? 0), '127.0.0.1', () =>
    console.log(`listening on ${server.address().port}`));
