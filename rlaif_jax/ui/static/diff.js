// A difference of two texts by words, for the eye: longest common subsequence, common ends cut off first.

const MAX_CELLS = 4_000_000;

export const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];

/** [["same" | "gone" | "new", text], ...] that leads from `before` to `after`. */
export function diff(before, after) {
  const a = words(before), b = words(after), parts = [];
  const push = (kind, text) => {
    if (!text) return;
    if (parts.length && parts.at(-1)[0] === kind) parts.at(-1)[1] += text;
    else parts.push([kind, text]);
  };
  let start = 0, tail = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (tail < a.length - start && tail < b.length - start && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  const x = a.slice(start, a.length - tail), y = b.slice(start, b.length - tail);
  push("same", a.slice(0, start).join(""));
  if (x.length * y.length > MAX_CELLS) { // too much to compare: one block
    push("gone", x.join(""));
    push("new", y.join(""));
  } else {
    const width = y.length + 1, length = new Uint32Array((x.length + 1) * width);
    for (let i = x.length - 1; i >= 0; i--) {
      for (let j = y.length - 1; j >= 0; j--) {
        length[i * width + j] = x[i] === y[j] ? length[(i + 1) * width + j + 1] + 1
          : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
      }
    }
    let i = 0, j = 0;
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && x[i] === y[j]) {
        push("same", x[i]);
        i++, j++;
      } else if (j >= y.length || (i < x.length && length[(i + 1) * width + j] >= length[i * width + j + 1])) {
        push("gone", x[i++]);
      } else {
        push("new", y[j++]);
      }
    }
  }
  push("same", a.slice(a.length - tail).join(""));
  return parts;
}
