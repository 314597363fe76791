// Runs an export with onnxruntime-web in Node and prints scores and predictions as JSON: node stepping_node.mjs ORT FOLDER
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { SteppingModel, StepClock } from "../stepping_plugin/runtimes/stepping.mjs";

const [, , modules, folder, request] = process.argv;
const ort = createRequire(`${modules}/`)("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const { batch, rules } = JSON.parse(await readFile(request));
const images = new Float32Array(new Uint8Array(await readFile(`${folder}/images.bin`)).buffer); // copied: aligned
const model = await SteppingModel.load(ort, folder, { read: readFile });
const session = await model.start(images, batch);
const scores = [[...session.logits]];
while (session.subnet < model.numSubnets) scores.push([...(await session.step())]);
const answers = [];
for (const options of rules) {
  const { logits, subnet, macs } = await model.predict(images, batch, options);
  answers.push({ logits: logits.map((row) => [...row]), subnet, macs });
}
const clock = new StepClock([100, 100]);
for (let k = 0; k < 24; k++) for (const level of [1, 2]) clock.record(level, 1, 0.4);
const allowed = Array.from({ length: 40 }, () => {
  clock.record(1, 1, 0.005);
  const runs = clock.allows(2, 1, 0.3, 1);
  if (runs) clock.record(2, 1, 0.005);
  return runs;
});
console.log(JSON.stringify({ scores, answers, macs: session.macs, allowed }));
