// Numbers and sentences as the page writes them.

const UNITS = ["bytes", "KiB", "MiB", "GiB"];

export const bytes = (count) => {
  let unit = 0;
  for (; count >= 1024 && unit < UNITS.length - 1; unit++) count /= 1024;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${UNITS[unit]}`;
};
export const seconds = (value) => (value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`);
export const whole = (value) => value.toLocaleString("en");
export const plural = (count, word) => `${whole(count)} ${word}${count === 1 ? "" : "s"}`;

/** A text as a sentence: a capital at its begin, a full stop at its end. */
export function sentence(text) {
  const said = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(said) ? said : `${said}.`;
}
