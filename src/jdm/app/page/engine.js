/**
 * The engine: the one interface between the page and whatever draws.
 *
 * The page knows models, drawings and pictures. It knows no server, socket, network weight or thread: those are an
 * engine's. `index.html` names the engine's file in <meta name="engine" content="./server.js">, whose default export is
 * a function `open()`. Another engine is another file with the same export; nothing else of the page changes.
 *
 *   open(progress: (share: number) => void): Promise<Engine>
 *       While it loads it may say which share, in [0, 1], is there. Rejects with an Error whose message is one sentence
 *       for the user.
 *
 * @typedef {object} Engine
 * @property {Model[]} models  at least one; the first is shown at the start.
 * @property {Limits} limits
 * @property {string} [device]  as `jdm sample --device` takes it; the CPU where missing.
 * @property {(request: Request) => Promise<Result | null>} draw
 *       The live picture. The page calls it whenever something changed, without waiting for earlier calls. An engine
 *       draws one request at a time and, of those that wait, the newest alone: the others resolve to null at once
 *       (`newestOnly` below does that). Rejects with an Error whose message is one sentence for the user; a `Busy` says
 *       in how many seconds to try again, and the page then does.
 * @property {(request: Request) => Promise<Result>} compare
 *       The same drawing by the model's slow yardstick; called only where `model.compare` is not null.
 * @property {(listener: (message: string | null) => void) => void} onstate
 *       The listener is told a sentence while the engine cannot draw (a lost connection), and null once it can again.
 *
 * @typedef {object} Model
 * @property {string} name     as `jdm sample NAME` takes it.
 * @property {number} width    of its pictures, in pixels.
 * @property {number} height
 * @property {number} steps    of its sampler: 1 for a one-step student.
 * @property {Control[]} controls  the model's own first, then those that can be added to it; none for a model that
 *       takes no drawing.
 * @property {{name: string, steps: number} | null} compare  the slow yardstick.
 * @property {Page} page       what the model's card says of its page.
 *
 * @typedef {object} Control
 * @property {string} model    the name by which `jdm sample NAME` or `--also NAME` loads it; the key of its strength.
 * @property {string} label    what it measures, such as "canny".
 * @property {string | null} spec  its name for `jdm sample --control`, where the model's card does not say it.
 * @property {boolean} hand    people draw its map itself, on black; the page starts so.
 *
 * @typedef {object} Page      every entry may be missing.
 * @property {string} [paper]  colour of an empty canvas, "#rrggbb"; where missing white, or black for a map.
 * @property {string} [ink]    colour of the brush at the start; black or white, whichever is far from the paper.
 * @property {Object<string, string>} [styles]  name of a style -> a prompt with "{prompt}" in it.
 * @property {string[]} [prompts]  prompts to try; the first one is filled in at the start.
 *
 * @typedef {object} Limits
 * @property {number} prompt   characters of a prompt.
 * @property {number} pictures pictures of one request.
 * @property {number} bytes    of a picture file that is dropped.
 * @property {number} pixels   of a picture file that is dropped.
 *
 * @typedef {object} Request
 * @property {string} model
 * @property {string} prompt   whole: a style is already in it.
 * @property {number} seed     picture i starts from row i of the noise of this seed.
 * @property {number} toSeed   the noise is cos(a) z(seed) + sin(a) z(toSeed), a = blend pi / 2.
 * @property {number} blend    in [0, 1]; 0 leaves toSeed out.
 * @property {number} n        pictures.
 * @property {Object<string, number>} strengths  by Control.model, in [0, 100]; the own control's is always there, a
 *       further one is added where its strength is above 0.
 * @property {Pixels | null} picture  the drawing, exactly width x height of the model; null where it takes none.
 * @property {boolean} asMap   the drawing is the own control's map itself and is not measured; further controls are
 *       then left out.
 *
 * @typedef {{width: number, height: number, data: Uint8ClampedArray}} Pixels  RGBA, opaque; an ImageData is one.
 *
 * @typedef {object} Result
 * @property {ImageData[]} images  request.n pictures.
 * @property {{label: string, image: ImageData}[]} maps  of the controls that were used, the own first.
 * @property {number} milliseconds  that the model computed.
 * @property {number} steps
 * @property {string[]} notes  sentences for the user about this request, such as that the drawing is empty.
 */

/** The engine has no room now; `seconds` says when to try again. */
export class Busy extends Error {
  constructor(message, seconds) {
    super(message);
    this.seconds = seconds;
  }
}

/**
 * A function like `work` that runs one call at a time and keeps only the newest of those that wait: an older one that
 * waits resolves to null.
 *
 * @template T
 * @param {(request: Request) => Promise<T>} work
 * @returns {(request: Request) => Promise<T | null>}
 */
export function newestOnly(work) {
  let running = false;
  let waiting = null;
  async function run({ request, resolve, reject }) {
    running = true;
    try {
      resolve(await work(request));
    } catch (error) {
      reject(error);
    }
    running = false;
    const next = waiting;
    waiting = null;
    if (next) run(next);
  }
  return (request) => new Promise((resolve, reject) => {
    const call = { request, resolve, reject };
    if (!running) return run(call);
    waiting?.resolve(null);
    waiting = call;
  });
}

/** RGB bytes, three a pixel, as an ImageData. */
export function imageOf(bytes, width, height) {
  const image = new ImageData(width, height);
  for (let from = 0, to = 0; from < bytes.length; from += 3, to += 4) {
    image.data[to] = bytes[from];
    image.data[to + 1] = bytes[from + 1];
    image.data[to + 2] = bytes[from + 2];
    image.data[to + 3] = 255;
  }
  return image;
}

/** RGBA pixels as RGB bytes, three a pixel. */
export function bytesOf({ data }) {
  const bytes = new Uint8Array((data.length / 4) * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
    bytes[to] = data[from];
    bytes[to + 1] = data[from + 1];
    bytes[to + 2] = data[from + 2];
  }
  return bytes;
}
