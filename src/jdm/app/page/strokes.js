/** The control `strokes` of a small picture: the exact lines that jdm.controls.strokes.Strokes measures. */
import { canny } from "./canny.js";

const UNIT = 64; // lengths are in 64ths of the shorter side
// Distances to the neighbours that the first of two passes over a picture has seen already: (rows, columns, distance).
const SEEN = [[-2, -1, 2.1969], [-2, 1, 2.1969], [-1, -2, 2.1969], [-1, -1, 1.4], [-1, 0, 1], [-1, 1, 1.4],
  [-1, 2, 2.1969], [0, -1, 1]];

/**
 * @param {{width: number, height: number, data: Uint8ClampedArray}} picture RGBA
 * @param {{low: number, high: number, width: number, shortest: number, blur: number[]}} settings as in the control's
 *   card; `blur` are the weights of its Gaussian, whole numbers that sum to 256
 * @returns {Float32Array} in [0, 1]
 */
export function strokes(picture, { low, high, width, shortest, blur }) {
  const pixel = Math.min(picture.width, picture.height) / UNIT;
  const blurred = smooth(picture, blur);
  let edges = canny(blurred, { low: low / pixel, high: high / pixel });
  if (!edges.some(Boolean)) edges = canny(blurred, { low: low / 2 / pixel, high: high / 2 / pixel });
  const away = distances(picture.width, picture.height, kept(picture.width, picture.height, edges, shortest * pixel));
  return away.map((distance) => Math.min(1, Math.max(0, (width * pixel) / 2 + 0.5 - distance)));
}

/** OpenCV's Gaussian blur of 8 bits; borders are repeated. */
function smooth({ width, height, data }, weights) {
  const reach = (weights.length - 1) / 2;
  const sums = new Uint32Array(data.length);
  const blurred = new Uint8ClampedArray(data.length).fill(255);
  const pass = (from, to, step, places, place, i) => { // along one axis, at one number
    let sum = 0;
    for (let k = -reach; k <= reach; k++) {
      const at = Math.min(places - 1, Math.max(0, place + k));
      sum += weights[k + reach] * from[i + (at - place) * step];
    }
    to[i] = sum;
  };
  const each = (work) => {
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i += 4) for (let c = 0; c < 3; c++) work(x, y, i + c);
    }
  };
  each((x, y, i) => pass(data, sums, 4, width, x, i));
  const both = new Float64Array(data.length);
  each((x, y, i) => pass(sums, both, 4 * width, height, y, i));
  each((x, y, i) => { blurred[i] = Math.floor((both[i] + 32768) / 65536); });
  return { width, height, data: blurred };
}

/** The connected lines of at least `shortest` pixels; the longest is always there. */
function kept(width, height, edges, shortest) {
  const seen = new Uint8Array(edges.length);
  let longest = [];
  const lines = new Uint8Array(edges.length);
  for (const first of blocks(width, height)) {
    if (!edges[first] || seen[first]) continue;
    const line = [first];
    seen[first] = 1;
    for (let at = 0; at < line.length; at++) {
      const [x, y] = [line[at] % width, Math.floor(line[at] / width)];
      for (let v = Math.max(0, y - 1); v <= Math.min(height - 1, y + 1); v++) {
        for (let u = Math.max(0, x - 1); u <= Math.min(width - 1, x + 1); u++) {
          const next = v * width + u;
          if (edges[next] && !seen[next]) line.push(next);
          if (edges[next]) seen[next] = 1;
        }
      }
    }
    if (line.length > longest.length) longest = line;
    if (line.length >= shortest) for (const i of line) lines[i] = 1;
  }
  for (const i of longest) lines[i] = 1;
  return lines;
}

/** Pixels in the order in which OpenCV numbers lines, two rows and two columns at a time: of two longest ones the first
 * stays. */
function* blocks(width, height) {
  for (let y = 0; y < height; y += 2) {
    for (let x = 0; x < width; x += 2) {
      for (const [v, u] of [[y, x], [y, x + 1], [y + 1, x], [y + 1, x + 1]]) {
        if (v < height && u < width) yield v * width + u;
      }
    }
  }
}

/** The distance of each pixel from the nearest line, as OpenCV adds it up from steps; Infinity without a line. */
function distances(width, height, lines) {
  const found = Float32Array.from(lines, (line) => (line ? 0 : Infinity));
  const pass = (x, y, sign) => {
    const i = y * width + x;
    for (const [rows, columns, distance] of SEEN) {
      const [v, u] = [y + sign * rows, x + sign * columns];
      if (v >= 0 && v < height && u >= 0 && u < width) found[i] = Math.min(found[i], found[v * width + u] + distance);
    }
  };
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) pass(x, y, 1);
  for (let y = height - 1; y >= 0; y--) for (let x = width - 1; x >= 0; x--) pass(x, y, -1);
  return found;
}
