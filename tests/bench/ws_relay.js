// ws_relay.js - the relay of `make bench` on Node's `ws`.
//
// SPDX-License-Identifier: MIT
//
//   node ws_relay.js [PORT]   0, the default, picks one; says it as collabd does
import { WebSocket, WebSocketServer } from 'ws';

const port = Number(process.argv[2] ?? 0);
const server = new WebSocketServer({ host: '127.0.0.1', port, backlog: 1024, perMessageDeflate: false });

server.on('connection', (sender) => {
  sender.on('error', () => {});
  sender.on('message', (data, binary) => {
    for (const member of server.clients) {
      if (member !== sender && member.readyState === WebSocket.OPEN) {
        member.send(data, { binary });
      }
    }
  });
});

server.on('listening', () => {
  console.error(`info: listening on http://127.0.0.1:${server.address().port}`);
  console.error('info: ready');
});
