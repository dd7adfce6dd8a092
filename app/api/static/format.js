// Numbers as people read them.

const significant = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** A score or another plain number, to four digits. */
export function number(value) {
  return significant.format(value);
}

/** A count, with its thousands apart. */
export function count(value) {
  return whole.format(value);
}

/** "1 image", "1,200 images". */
export function images(value) {
  return `${count(value)} ${value === 1 ? "image" : "images"}`;
}

/** A share as a percentage: two digits below ten, none lost of a small one. */
export function percent(share) {
  const value = share * 100;
  const digits = value === 0 || value >= 99.95 ? 0 : value < 0.1 ? 2 : value < 99.5 ? 1 : 2;
  return `${value.toFixed(digits)}%`;
}

/** A duration: "3.2 ms", "41 ms", "1.4 s". */
export function duration(seconds) {
  const ms = seconds * 1000;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${whole.format(ms)} ms` : `${seconds.toFixed(1)} s`;
}

/** A rate per second. */
export function rate(value) {
  return value === 0 ? "0" : value < 10 ? value.toFixed(1) : whole.format(value);
}

/** A moment of today as a clock shows it, of another day with its date. */
export function moment(iso) {
  const when = new Date(iso);
  const isToday = when.toDateString() === new Date().toDateString();
  return isToday ? when.toLocaleTimeString("en-GB") : when.toLocaleString("en-GB");
}
