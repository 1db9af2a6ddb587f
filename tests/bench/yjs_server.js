// yjs_server.js - the reference of `make bench` for documents:
// @y/websocket-server as it is, on a free port, which it says as collabd does.
//
// SPDX-License-Identifier: MIT
import { Server } from 'node:net';

const { listen } = Server.prototype;
Server.prototype.listen = function (...args) {
  this.on('listening', () => {
    console.error(`info: listening on http://127.0.0.1:${this.address().port}`);
    console.error('info: ready');
  });
  return listen.apply(this, args);
};

process.env.HOST = '127.0.0.1';
process.env.PORT = '0';
const its = import.meta.resolve('@y/websocket-server/package.json');
await import(new URL('src/server.js', its));
