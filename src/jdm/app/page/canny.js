/** OpenCV's Canny of a small picture: the same edges as cv2.Canny(picture, low, high), to the pixel. */

const TAN = 13573; // tan(22.5 degrees) in units of 2^-15

/**
 * @param {{width: number, height: number, data: Uint8ClampedArray}} picture RGBA
 * @param {{low: number, high: number, grey: boolean}} settings thresholds on |gx| + |gy|; edges of the luma where grey
 * @returns {Uint8Array} 255 at edges, 0 elsewhere
 */
export function canny({ width, height, data }, { low, high, grey }) {
  const gradient = steepest(width, height, grey ? [luma(data)] : [0, 1, 2].map((c) => channel(data, c)));
  const found = thinned(width, height, gradient, Math.floor(low), Math.floor(high));
  return connected(width, height, found);
}

function channel(data, c) {
  return Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i + c]);
}

/** OpenCV's grey, in its whole numbers. */
function luma(data) {
  return Uint8Array.from({ length: data.length / 4 }, (_, i) =>
    (9798 * data[4 * i] + 19235 * data[4 * i + 1] + 3735 * data[4 * i + 2] + 16384) >> 15);
}

/** Sobel's gradient of the channel where |gx| + |gy| is largest, the first of equal ones; borders are repeated. */
function steepest(width, height, channels) {
  const [gx, gy, size] = [new Int32Array(width * height), new Int32Array(width * height), new Int32Array(width * height)];
  size.fill(-1);
  for (const picture of channels) {
    for (let y = 0, i = 0; y < height; y++) {
      const rows = [Math.max(0, y - 1), y, Math.min(height - 1, y + 1)].map((row) => row * width);
      for (let x = 0; x < width; x++, i++) {
        const [left, right] = [Math.max(0, x - 1), Math.min(width - 1, x + 1)];
        const [a, b, c] = [picture[rows[0] + left], picture[rows[0] + x], picture[rows[0] + right]];
        const [d, e] = [picture[rows[1] + left], picture[rows[1] + right]];
        const [f, g, h] = [picture[rows[2] + left], picture[rows[2] + x], picture[rows[2] + right]];
        const across = c + 2 * e + h - a - 2 * d - f;
        const down = f + 2 * g + h - a - 2 * b - c;
        const steep = Math.abs(across) + Math.abs(down);
        if (steep > size[i]) [gx[i], gy[i], size[i]] = [across, down, steep];
      }
    }
  }
  return { gx, gy, size };
}

/** 2 at strong edges, 1 at weak ones: gradients above a threshold that no neighbour along them exceeds. */
function thinned(width, height, { gx, gy, size }, low, high) {
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : size[y * width + x]);
  const found = new Uint8Array(width * height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const own = size[i];
      if (own <= low) continue;
      const across = Math.abs(gx[i]);
      const down = Math.abs(gy[i]) * 32768;
      const flat = across * TAN; // below it the gradient runs along the row
      let kept;
      if (down < flat) kept = own > at(x - 1, y) && own >= at(x + 1, y);
      else if (down > flat + across * 65536) kept = own > at(x, y - 1) && own >= at(x, y + 1);
      else {
        const side = (gx[i] ^ gy[i]) < 0 ? -1 : 1;
        kept = own > at(x - side, y - 1) && own > at(x + side, y + 1);
      }
      if (kept) found[i] = own > high ? 2 : 1;
    }
  }
  return found;
}

/** Strong edges, and weak ones that touch them. */
function connected(width, height, found) {
  const edges = new Uint8Array(width * height);
  const waiting = [];
  const take = (i) => { edges[i] = 255; waiting.push(i); };
  found.forEach((kind, i) => { if (kind === 2) take(i); });
  while (waiting.length) {
    const i = waiting.pop();
    const [x, y] = [i % width, Math.floor(i / width)];
    for (let v = Math.max(0, y - 1); v <= Math.min(height - 1, y + 1); v++) {
      for (let u = Math.max(0, x - 1); u <= Math.min(width - 1, x + 1); u++) {
        const next = v * width + u;
        if (found[next] && !edges[next]) take(next);
      }
    }
  }
  return edges;
}
