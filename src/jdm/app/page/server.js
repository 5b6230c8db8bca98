/** The engine that asks the server of `jdm app`, over one WebSocket. The contract is in engine.js. */
import { Busy, bytesOf, imageOf, newestOnly } from "./engine.js";

const token = new URLSearchParams(location.search).get("token");

function at(path) {
  const url = new URL(path, location.href);
  if (token) url.searchParams.set("token", token);
  return url;
}

export async function open() {
  let answer;
  try {
    answer = await fetch(at("api/models"));
  } catch {
    throw new Error("The server does not answer; start it again with jdm app, then reload this page.");
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  const line = new Line();
  return {
    ...found,
    draw: newestOnly((request) => line.ask(request, false)),
    compare: (request) => line.ask(request, true),
    onstate: (listener) => { line.listener = listener; },
  };
}

/** One WebSocket, opened again when it is lost; every question has a number, and its answer the same. */
class Line {
  listener = () => {};
  #socket = null;
  #opening = null;
  #waiting = new Map();
  #next = 0;

  async ask(request, compare) {
    const socket = await this.#open();
    const id = this.#next++;
    const pixels = request.picture ? bytesOf(request.picture) : new Uint8Array();
    const head = new TextEncoder().encode(JSON.stringify({
      id, compare, model: request.model, prompt: request.prompt, seed: request.seed, to_seed: request.toSeed,
      blend: request.blend, n: request.n, strengths: request.strengths, as_map: request.asMap,
    }));
    const message = new Uint8Array(4 + head.length + pixels.length);
    new DataView(message.buffer).setUint32(0, head.length, true);
    message.set(head, 4);
    message.set(pixels, 4 + head.length);
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      socket.send(message);
    });
  }

  #open() {
    this.#opening ??= new Promise((resolve, reject) => {
      const url = at("api/live");
      url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
      const socket = new WebSocket(url);
      socket.binaryType = "arraybuffer";
      socket.onopen = () => {
        this.#socket = socket;
        this.listener(null);
        resolve(socket);
      };
      socket.onmessage = ({ data }) => (typeof data === "string" ? this.#refused(JSON.parse(data)) : this.#drawn(data));
      socket.onclose = () => this.#lost(reject);
    });
    return this.#opening;
  }

  #lost(reject) {
    const error = new Busy("The connection to the server is lost; trying again.", 2);
    this.#socket = this.#opening = null;
    this.listener(error.message);
    for (const call of this.#waiting.values()) call.reject(error);
    this.#waiting.clear();
    reject(error);
  }

  #refused({ id, error, seconds, stale }) {
    const known = this.#waiting.has(id);
    const calls = known ? [this.#waiting.get(id)] : [...this.#waiting.values()];
    if (known) this.#waiting.delete(id);
    else this.#waiting.clear();
    for (const call of calls) {
      if (stale) call.resolve(null);
      else call.reject(seconds ? new Busy(sentence(error), seconds) : new Error(sentence(error)));
    }
  }

  #drawn(data) {
    const length = new DataView(data).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    const size = head.width * head.height * 3;
    const image = (i) => imageOf(new Uint8Array(data, 4 + length + i * size, size), head.width, head.height);
    const first = head.maps.length;
    this.#waiting.get(head.id)?.resolve({
      images: Array.from({ length: head.n }, (_, i) => image(first + i)),
      maps: head.maps.map((label, i) => ({ label, image: image(i) })),
      milliseconds: head.milliseconds,
      steps: head.steps,
      notes: head.notes,
    });
    this.#waiting.delete(head.id);
  }
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
