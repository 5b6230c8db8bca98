/** The canvas that is drawn on: strokes, undo, pictures, and what it looks like at the model's size. */

const SIDE = 512; // of the canvas, roughly, in its own pixels: a whole multiple of the model's
const KEPT = 40; // steps of undo

export class Board {
  tool = "brush";
  colour = "#000000";
  width = 16; // of the brush, in canvas pixels
  paper = "#ffffff";
  #undo = [];
  #redo = [];
  #stroke = null;
  #cursor = null;
  #pen = false;

  /** @param {() => void} changed called whenever the drawing is another. */
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.ink = canvas.getContext("2d", { willReadFrequently: true, alpha: false });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { this.#stroke = null; });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => { this.#pen = false; });
  }

  /** Makes the canvas fit a model; the drawing is kept, resized to cover it. */
  fit(width, height, paper) {
    this.times = Math.max(1, Math.round(SIDE / Math.max(width, height)));
    const [across, down] = [width * this.times, height * this.times];
    const empty = !this.#undo.length && !this.#redo.length;
    if (empty || (this.canvas.width === across && this.canvas.height === down)) {
      if (this.canvas.width !== across || this.canvas.height !== down) [this.canvas.width, this.canvas.height] = [across, down];
      this.paper = paper;
      if (empty) this.#fill();
      return;
    }
    const old = Object.assign(document.createElement("canvas"), { width: this.canvas.width, height: this.canvas.height });
    old.getContext("2d").drawImage(this.canvas, 0, 0);
    [this.canvas.width, this.canvas.height] = [across, down];
    this.#undo = [];
    this.#redo = [];
    this.paper = paper;
    this.#cover(old, old.width, old.height);
    this.#undo = [this.#now()];
  }

  /** The drawing at the model's size: RGBA, each pixel the mean of a square of canvas pixels. */
  pixels() {
    const { width, height } = this.canvas;
    const whole = this.ink.getImageData(0, 0, width, height);
    const [k, data] = [this.times, whole.data];
    if (k === 1) return whole;
    const small = new ImageData(width / k, height / k);
    const sums = new Uint32Array((width / k) * 3);
    for (let row = 0, from = 0; row < small.height; row++) {
      sums.fill(0);
      for (let y = 0; y < k; y++) {
        for (let x = 0, to = 0; x < small.width; x++, to += 3) {
          for (let i = 0; i < k; i++, from += 4) {
            sums[to] += data[from];
            sums[to + 1] += data[from + 1];
            sums[to + 2] += data[from + 2];
          }
        }
      }
      for (let x = 0, to = row * small.width * 4; x < sums.length; x += 3, to += 4) {
        for (let c = 0; c < 3; c++) small.data[to + c] = Math.round(sums[x + c] / (k * k));
        small.data[to + 3] = 255;
      }
    }
    return small;
  }

  /** Draws a picture over the whole canvas, its middle where the proportions differ. */
  place(source, width, height, { keep = true, mirrored = false } = {}) {
    if (keep) this.#keep();
    this.#cover(source, width, height, mirrored);
    this.changed();
  }

  clear() {
    this.#keep();
    this.#fill();
    this.changed();
  }

  undo() {
    this.#swap(this.#undo, this.#redo);
  }

  redo() {
    this.#swap(this.#redo, this.#undo);
  }

  /** Remembers the drawing as a step that can be undone. */
  keep() {
    this.#keep();
  }

  #swap(from, to) {
    if (!from.length) return;
    to.push(this.#now());
    this.ink.putImageData(from.pop(), 0, 0);
    this.changed();
  }

  #now() {
    return this.ink.getImageData(0, 0, this.canvas.width, this.canvas.height);
  }

  #keep() {
    this.#undo.push(this.#now());
    if (this.#undo.length > KEPT) this.#undo.shift();
    this.#redo = [];
  }

  #fill() {
    this.ink.fillStyle = this.paper;
    this.ink.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  #cover(source, width, height, mirrored = false) {
    const { width: across, height: down } = this.canvas;
    const scale = Math.max(across / width, down / height);
    const [w, h] = [across / scale, down / scale];
    this.#fill();
    this.ink.save();
    this.ink.imageSmoothingQuality = "high";
    if (mirrored) this.ink.transform(-1, 0, 0, 1, across, 0);
    this.ink.drawImage(source, (width - w) / 2, (height - h) / 2, w, h, 0, 0, across, down);
    this.ink.restore();
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
  }

  #down(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#keep();
    this.#stroke = this.#place(event);
    this.#line(this.#stroke, this.#stroke, event);
  }

  #move(event) {
    if (!this.#stroke) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) {
      const to = this.#place(each);
      this.#line(this.#stroke, to, each);
      this.#stroke = to;
    }
  }

  #line(from, to, { pointerType, pressure } = {}) {
    const { ink } = this;
    ink.lineCap = ink.lineJoin = "round";
    ink.lineWidth = this.width * (pointerType === "pen" ? 0.3 + 1.4 * pressure : 1);
    ink.strokeStyle = this.tool === "eraser" ? this.paper : this.colour;
    ink.beginPath();
    ink.moveTo(from.x, from.y);
    ink.lineTo(to.x, to.y + (from.x === to.x && from.y === to.y ? 0.01 : 0));
    ink.stroke();
    this.changed();
  }

  /** Arrows move a pen over the canvas; Space puts it down and lifts it. */
  #key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey || !(step || event.key === " ")) return;
    event.preventDefault();
    this.#cursor ??= { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    if (event.key === " ") {
      if (event.repeat) return;
      this.#pen = !this.#pen;
      if (this.#pen) this.#keep();
      if (this.#pen) this.#line(this.#cursor, this.#cursor);
    } else {
      const pace = Math.max(this.width / 2, this.canvas.width / 64);
      const to = {
        x: Math.min(this.canvas.width, Math.max(0, this.#cursor.x + step[0] * pace)),
        y: Math.min(this.canvas.height, Math.max(0, this.#cursor.y + step[1] * pace)),
      };
      if (this.#pen) this.#line(this.#cursor, to);
      this.#cursor = to;
    }
    this.canvas.dispatchEvent(new CustomEvent("cursor", { detail: { ...this.#cursor, down: this.#pen } }));
  }
}
