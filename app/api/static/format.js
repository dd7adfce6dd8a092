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

/** A share as a percentage; neither a small share nor a small remainder is rounded away. */
export function percent(share) {
  const value = share * 100;
  if (value === 0 || value === 100) return `${value}%`;
  if (value < 0.01) return "<0.01%";
  if (value > 99.99) return ">99.99%";
  return `${value.toFixed(value < 0.1 || value > 99.9 ? 2 : 1)}%`;
}

/** Odds against chance of which the logarithm is given: "12 to 1", "10⁸ to 1". */
export function odds(log10) {
  if (log10 < 4) return `${significant.format(10 ** log10)} to 1`;
  const power = [...log10.toFixed(0)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
  return `10${power} to 1`;
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
