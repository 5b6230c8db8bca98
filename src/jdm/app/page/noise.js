/** The noise that PyTorch draws on a CPU for a seed, so that a seed is the same picture here and in `jdm sample`. */

const N = 624;
const M = 397;

/** The Mersenne Twister of 32 bits (Matsumoto and Nishimura, 1998). */
class Twister {
  #state = new Uint32Array(N);
  #at = N;

  constructor(seed) {
    this.#state[0] = seed;
    for (let i = 1; i < N; i++) {
      const last = this.#state[i - 1] ^ (this.#state[i - 1] >>> 30);
      this.#state[i] = Math.imul(1812433253, last) + i;
    }
  }

  next() {
    if (this.#at === N) this.#turn();
    let y = this.#state[this.#at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  #turn() {
    const s = this.#state;
    for (let i = 0; i < N; i++) {
      const y = (s[i] & 0x80000000) | (s[(i + 1) % N] & 0x7fffffff);
      s[i] = s[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.#at = 0;
  }
}

/** `count` standard normal numbers, at least 16, as torch.randn fills a tensor: Box and Muller's pairs, by sixteens. */
function normal(twister, count) {
  const numbers = Float32Array.from({ length: count }, () => (twister.next() & 0xffffff) / 0x1000000);
  const pairs = (from) => {
    for (let i = from; i < from + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - numbers[i]));
      const angle = 2 * Math.PI * numbers[i + 8];
      numbers[i] = radius * Math.cos(angle);
      numbers[i + 8] = radius * Math.sin(angle);
    }
  };
  for (let from = 0; from + 16 <= count; from += 16) pairs(from);
  if (count % 16) { // the last sixteen are drawn again
    for (let i = count - 16; i < count; i++) numbers[i] = (twister.next() & 0xffffff) / 0x1000000;
    pairs(count - 16);
  }
  return numbers;
}

/** eps_k of the first n pictures of a seed, n times `count` numbers; k = 0 is the starting noise. */
export function fresh(n, count, seed, k) {
  const all = new Float32Array(n * count);
  for (let i = 0; i < n; i++) {
    const twister = new Twister(Number(BigInt.asUintN(32, BigInt(seed) * 1_000_003n + BigInt(i))));
    let row;
    for (let drawn = 0; drawn <= k; drawn++) row = normal(twister, count);
    all.set(row, i * count);
  }
  return all;
}

/** cos(a) z(seed) + sin(a) z(toSeed), a = blend pi / 2. */
export function blended(n, count, { seed, toSeed, blend }) {
  if (blend === 0 || blend === 1) return fresh(n, count, blend ? toSeed : seed, 0);
  const [from, to] = [fresh(n, count, seed, 0), fresh(n, count, toSeed, 0)];
  const [cos, sin] = [Math.cos((blend * Math.PI) / 2), Math.sin((blend * Math.PI) / 2)];
  return from.map((z, i) => cos * z + sin * to[i]);
}
