/**
 * Stepping an ONNX export (`stepping export RUN --format onnx`) with onnxruntime-web, in browsers and in Node.
 *
 *   import * as ort from "onnxruntime-web";
 *   import { SteppingModel } from "./stepping.mjs";
 *
 *   const model = await SteppingModel.load(ort, "export-onnx");
 *   const session = await model.start(images, batch); // Float32Array (B, C, H, W); subnet 1: session.logits
 *   await session.step(); // subnet 2, for the price of the difference
 *   await model.predict(images, batch, { until: { max_prob: 0.9 }, deadline: 0.02 });
 *
 * The same manifest, rules and names as those of `stepping_plugin.runtimes.ort` for Python.
 */

const WINDOW = 24; // measured times that are remembered per step and batch size
const PATIENCE = [16, 256]; // refusals in a row before a step is tried all the same: at first, and at most

/** Measured times of every step; guarantees: `stepping_plugin/runtimes/clock.py`. */
export class StepClock {
  constructor(macs) {
    this.macs = macs;
    this.records = new Map();
    this.slowdown = 1;
  }

  record(level, batch, seconds) {
    const known = this.#record(level, batch);
    const usual = known.times.length ? quantile(known.times, 0.5) : seconds;
    if (known.trial) known.times = [];
    known.times = [...known.times, seconds].slice(-WINDOW);
    known.trial = false;
    known.refused = 0;
    if (known.times.length === WINDOW) known.patience = PATIENCE[0];
    this.slowdown = usual > 0 ? seconds / usual : 1;
  }

  /** Whether step `level` may run with `left` seconds to go: it will probably end in time, or it is tried. */
  allows(level, batch, left, last = 0) {
    if (left <= 0) return false;
    if (this.estimate(level, batch, last) <= left) return true;
    const known = this.#record(level, batch);
    if (known.refused < known.patience) {
      for (let missed = level; missed <= this.macs.length; missed++) this.#record(missed, batch).refused += 1;
      return false;
    }
    known.refused = 0;
    known.trial = true;
    known.patience = Math.min(2 * known.patience, PATIENCE[1]);
    return true;
  }

  /** Seconds that step `level` will hardly exceed. */
  estimate(level, batch, last = 0) {
    return this.#usual(level, batch, last) * (last ? Math.max(1, this.slowdown) : 1);
  }

  #usual(level, batch, last) {
    const own = this.#measured(level);
    if (own.has(batch)) return own.get(batch);
    if (own.size) {
      const larger = [...own].filter(([size]) => size >= batch).map(([, seconds]) => seconds);
      return larger.length ? Math.min(...larger) : Math.max(...[...own].map(([size, s]) => (s * batch) / size));
    }
    const share = this.macs[level - 1] / Math.max(1, this.macs[Math.max(0, last - 1)]);
    const guesses = [...this.#measured(last)].map(([size, s]) => s * Math.max(1, batch / size) * share);
    return 2 * Math.max(0, ...guesses);
  }

  #measured(level) {
    const found = new Map();
    for (const known of this.records.values())
      if (known.level === level && known.times.length) found.set(known.batch, quantile(known.times, 0.9));
    return found;
  }

  #record(level, batch) {
    const key = `${level}/${batch}`;
    if (!this.records.has(key))
      this.records.set(key, { level, batch, times: [], refused: 0, patience: PATIENCE[0], trial: false });
    return this.records.get(key);
  }
}

const quantile = (values, share) =>
  [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(share * values.length))];

/** The steps of an export, ready to run. Any number of sessions share it. */
export class SteppingModel {
  /**
   * @param ort onnxruntime-web, or whatever has its `InferenceSession` and `Tensor`
   * @param folder address of the folder with manifest.json
   * @param read (address) => Promise<ArrayBuffer | Uint8Array>; fetches if left out
   * @param options of `InferenceSession.create`, such as executionProviders
   */
  static async load(ort, folder, { read = fetched, options = {} } = {}) {
    const file = async (name) => new Uint8Array(await read(`${folder}/${name}`));
    const manifest = JSON.parse(new TextDecoder().decode(await file("manifest.json")));
    if (manifest.format !== "stepping-plugin onnx export" || manifest.version !== 1)
      throw new Error(`${folder}: not an ONNX export of version 1 (${manifest.format}, version ${manifest.version})`);
    const weights = manifest.weights && [{ path: manifest.weights, data: await file(manifest.weights) }];
    const sessions = [];
    for (const step of manifest.steps) // one after the other: they are compiled in one memory
      sessions.push(
        await ort.InferenceSession.create(await file(step.file), weights ? { ...options, externalData: weights } : options),
      );
    return new SteppingModel(ort, manifest, sessions);
  }

  constructor(ort, manifest, sessions) {
    this.ort = ort;
    this.manifest = manifest;
    this.sessions = sessions;
    this.macs = manifest.macs;
    this.numSubnets = manifest.subnets;
    this.clock = new StepClock(manifest.steps.map((step) => step.macs));
  }

  /** Run subnet 1 on images, Float32Array of (batch, C, H, W); larger subnets follow with `session.step()`. */
  async start(images, batch = 1) {
    const shape = [batch, ...this.manifest.image_size];
    if (images.length !== shape.reduce((a, b) => a * b)) throw new Error(`images: ${images.length} numbers, not ${shape}`);
    if (this.manifest.batch !== "dynamic" && this.manifest.batch !== batch)
      throw new Error(`images: batch ${batch}, the export has ${this.manifest.batch}`);
    const session = new SteppingSession(this, new this.ort.Tensor(this.manifest.dtype, images, shape));
    await session.step();
    return session;
  }

  /**
   * Step up until a rule on the scores says stop, for each sample on its own, or until time runs out.
   *
   * @param until { max_prob: t }, { margin: t }, { entropy: t }, any of several; all samples go on without it
   * @param deadline seconds from now; subnet 1 always runs
   * @returns { logits: Float32Array per sample, subnet, macs: numbers per sample, seconds, inTime }
   */
  async predict(images, batch = 1, { until = {}, deadline = Infinity } = {}) {
    const began = performance.now();
    const elapsed = () => (performance.now() - began) / 1000;
    const session = await this.start(images, batch);
    const logits = session.rows();
    const subnet = new Array(batch).fill(1);
    let active = [...logits.keys()];
    while (session.subnet < this.numSubnets) {
      const going = session.rows().map((scores) => !stops(scores, until));
      if (!going.includes(true)) break;
      await session.keep(going);
      active = active.filter((_, k) => going[k]);
      const left = deadline - elapsed();
      if (!this.clock.allows(session.subnet + 1, active.length, left, session.subnet)) break;
      await session.step();
      session.rows().forEach((scores, k) => (logits[active[k]] = scores));
      for (const sample of active) subnet[sample] = session.subnet;
    }
    const seconds = elapsed();
    return { logits, subnet, macs: subnet.map((i) => this.macs[i - 1]), seconds, inTime: seconds <= deadline };
  }
}

/** What one batch of images has computed so far. Made by `SteppingModel.start`, which runs subnet 1. */
export class SteppingSession {
  constructor(model, images) {
    this.model = model;
    this.caches = new Map([["image", images]]);
    this.batch = images.dims[0];
    this.subnet = 0;
    this.places = new Map(model.manifest.steps.flatMap((s) => [...s.inputs, ...s.outputs]).map((e) => [e.cache, e]));
  }

  /** MACs executed so far, per sample that is still in the session. */
  get macs() {
    return this.model.macs[this.subnet - 1];
  }

  /** Run the next subnet's new units; returns its class scores, Float32Array (B * classes). */
  async step() {
    if (this.subnet === this.model.numSubnets) throw new Error(`subnet ${this.subnet} has run; there is no larger one`);
    const step = this.model.manifest.steps[this.subnet];
    const began = performance.now();
    const feeds = Object.fromEntries(step.inputs.map((entry) => [entry.name, this.caches.get(entry.cache)]));
    const results = await this.model.sessions[this.subnet].run(feeds);
    for (const entry of step.outputs) this.caches.set(entry.cache, results[entry.name]);
    for (const name of step.drop) this.caches.delete(name);
    this.logits = await this.caches.get("scores").getData();
    this.subnet += 1;
    this.model.clock.record(this.subnet, this.batch, (performance.now() - began) / 1000);
    return this.logits;
  }

  /** Class scores of every sample, copied. */
  rows() {
    const classes = this.logits.length / this.batch;
    return Array.from({ length: this.batch }, (_, k) => this.logits.slice(k * classes, (k + 1) * classes));
  }

  /** Go on with the samples of a mask, true = stays; what is held for the others is dropped. */
  async keep(mask) {
    const kept = [...mask.keys()].filter((k) => mask[k]);
    if (kept.length === this.batch) return;
    if (mask.length !== this.batch || !kept.length) throw new Error(`keep: ${this.batch} booleans, one of them true`);
    for (const [name, cache] of this.caches) {
      const { axis, outer = 1 } = this.places.get(name);
      if (axis !== undefined) this.caches.set(name, await this.#selected(cache, axis, outer, kept));
    }
    this.logits = await this.caches.get("scores").getData();
    this.batch = kept.length;
  }

  /** Sample b has the rows (o * batch + b) * inner + i of the axis, o < outer. */
  async #selected(cache, axis, outer, kept) {
    const data = await cache.getData();
    const rest = cache.dims.slice(axis + 1).reduce((a, b) => a * b, 1);
    const blocks = cache.dims.slice(0, axis).reduce((a, b) => a * b, 1) * outer;
    const size = (cache.dims[axis] / (outer * this.batch)) * rest; // numbers of one sample that lie together
    const picked = new data.constructor(blocks * kept.length * size);
    for (let block = 0; block < blocks; block++)
      kept.forEach((sample, k) => {
        const start = (block * this.batch + sample) * size;
        picked.set(data.subarray(start, start + size), (block * kept.length + k) * size);
      });
    const dims = cache.dims.map((n, d) => (d === axis ? (n / this.batch) * kept.length : n));
    return new this.model.ort.Tensor(cache.type, picked, dims);
  }
}

/** Softmax probabilities of one sample's scores. */
export function softmax(scores) {
  const top = Math.max(...scores);
  const powers = Array.from(scores, (score) => Math.exp(score - top));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** Whether one of the rules is satisfied: largest probability, lead over the second, or entropy in nats. */
export function stops(scores, until) {
  const shares = softmax(scores);
  const [first, second = 0] = [...shares].sort((a, b) => b - a);
  const measured = { max_prob: first, margin: first - second };
  measured.entropy = -shares.reduce((sum, p) => sum + (p > 0 ? p * Math.log(p) : 0), 0);
  return Object.entries(until).some(([rule, limit]) => {
    if (!(rule in measured)) throw new Error(`until: unknown rule ${rule}; max_prob, margin or entropy`);
    return rule === "entropy" ? measured[rule] <= limit : measured[rule] >= limit;
  });
}

async function fetched(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address}: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}
