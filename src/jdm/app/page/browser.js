/** The engine that computes in this browser, with onnxruntime in a worker. The contract is in engine.js. */
import { newestOnly } from "./engine.js";

// A WebAssembly module whose one function returns a vector of 128 bits.
const VECTOR = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11];
const NEWER = "open this page in Chrome 91, Firefox 114, Safari 16.4 or a newer one.";

export async function open(progress) {
  if (!globalThis.WebAssembly?.validate(Uint8Array.from(VECTOR))) {
    throw new Error(`This browser has no WebAssembly SIMD, with which the model is computed; ${NEWER}`);
  }
  if (!globalThis.DecompressionStream) {
    throw new Error(`This browser has no DecompressionStream, with which the program is unpacked; ${NEWER}`);
  }
  const worker = new Calls(new Worker(new URL("./painter.js", import.meta.url), { type: "module" }), progress);
  const found = await worker.call("load", new URL("./models.json", import.meta.url).href);
  return {
    ...found,
    draw: newestOnly((request) => worker.call("draw", request)),
    compare: () => Promise.reject(new Error("The slow model is not part of this page.")),
    onstate: () => {},
  };
}

/** A worker's functions: every call has a number, and its answer the same. */
class Calls {
  #waiting = new Map();
  #next = 0;

  constructor(worker, progress) {
    this.worker = worker;
    worker.onmessage = ({ data: { id, share, error, value } }) => {
      if (share !== undefined) return progress(share);
      const { resolve, reject } = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error) reject(new Error(error));
      else resolve(value);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      for (const { reject } of this.#waiting.values()) {
        reject(new Error(`The part of this page that computes did not start (${event.message ?? "no module workers"}); ${NEWER}`));
      }
    };
  }

  call(name, argument) {
    return new Promise((resolve, reject) => {
      this.#waiting.set(this.#next, { resolve, reject });
      this.worker.postMessage({ id: this.#next++, name, argument });
    });
  }
}
