/** CLIP's byte-pair tokenizer, from the tokenizer.json that transformers writes. */

const SPACES = /\p{White_Space}+/gu;
const PIECES = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
// What byte-level models split by; it cuts the special tokens of other capitals that a piece may still be.
const PARTS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\p{L}\p{N}]+/gu;

export class Tokenizer {
  #vocabulary;
  #words; // by id
  #ranks = new Map(); // of merges, by "left right"
  #special = new Map(); // text -> id
  #known = new Map(); // piece -> ids
  #bytes = byteLetters();

  /** @param {object} file a parsed tokenizer.json */
  constructor({ model, added_tokens, post_processor, padding }) {
    this.#vocabulary = model.vocab;
    this.#words = Object.fromEntries(Object.entries(model.vocab).map(([word, id]) => [id, word]));
    model.merges.forEach((pair, rank) => this.#ranks.set(typeof pair === "string" ? pair : pair.join(" "), rank));
    for (const { content, id } of added_tokens) {
      this.#special.set(content, id);
      this.#words[id] = content;
    }
    this.unknown = model.vocab[model.unk_token] ?? this.#special.get(model.unk_token);
    this.suffix = model.end_of_word_suffix;
    [this.start, this.end] = [post_processor.cls[1], post_processor.sep[1]];
    [this.length, this.pad] = [padding.strategy.Fixed, padding.pad_id];
  }

  /** Exactly `length` ids: start, the text's, end, padding. */
  ids(text) {
    const found = [this.start, ...this.#all(text).slice(0, this.length - 2), this.end];
    return [...found, ...Array(this.length - found.length).fill(this.pad)];
  }

  /** The end of a text that is beyond the model's length; "" where there is none. */
  unread(text) {
    const rest = this.#all(text).slice(this.length - 2);
    const letters = rest.map((id) => this.#words[id]).join("");
    const back = Object.fromEntries(this.#bytes.map((letter, byte) => [letter, byte]));
    return letters.split(this.suffix).map((word) => {
      const bytes = [...word].map((letter) => back[letter]);
      return bytes.includes(undefined) ? word : new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
    }).join(" ").replace(/^\p{White_Space}+|\p{White_Space}+$/gu, "");
  }

  /** Ids without start, end and padding. */
  #all(text) {
    const specials = [...this.#special.keys()].map((word) => word.replace(/[^\w]/g, "\\$&")).join("|");
    return text.split(new RegExp(`(${specials})`)).flatMap((part) => this.#special.get(part) ?? this.#plain(part));
  }

  #plain(text) {
    // Letter by letter: a whole word's lower case depends on its neighbours in Greek, which CLIP's does not.
    const lower = [...text.normalize("NFC").replace(SPACES, " ")].map((letter) => letter.toLowerCase()).join("");
    return (lower.match(PIECES) ?? []).flatMap((piece) => piece.match(PARTS)).flatMap((piece) => this.#merged(piece));
  }

  #merged(piece) {
    if (this.#known.has(piece)) return this.#known.get(piece);
    const parts = Array.from(new TextEncoder().encode(piece), (byte) => this.#bytes[byte]);
    parts[parts.length - 1] += this.suffix;
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.#ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    const ids = parts.map((part) => this.#vocabulary[part] ?? this.unknown);
    if (this.#known.size < 10_000) this.#known.set(piece, ids);
    return ids;
  }
}

/** The letter that stands for each byte in the vocabulary: itself where it is printed, else one beyond Latin-1. */
function byteLetters() {
  const printed = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printed(byte) ? byte : next++));
}
