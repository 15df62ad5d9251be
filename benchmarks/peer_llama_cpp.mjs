// One GGUF file in llama.cpp, as node-llama-cpp ships it; requests and answers are those of peer_worker.py.
// node peer_llama_cpp.mjs FILE THREADS PACKAGES, where PACKAGES is a folder that npm installed node-llama-cpp in.
import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const [file, threadsText, packages] = process.argv.slice(2);
const threads = Number(threadsText);
const home = path.join(path.resolve(packages), "node_modules", "node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(path.join(home, "dist", "index.js")));
const {version} = JSON.parse(fs.readFileSync(path.join(home, "package.json"), "utf8"));
const AT_ONCE = 16; // positions whose logits are held as objects of JavaScript

// what resourceUsage says begins with the peak of the process that started this one
const peakRssBytes = () =>
  fs.existsSync("/proc/self/status")
    ? Number(fs.readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s+(\d+)/)[1]) * 1024
    : process.resourceUsage().maxRSS * 1024;

const answer = (record) =>
  process.stdout.write(JSON.stringify({...record, peak_rss_bytes: peakRssBytes()}) + "\n");

const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 1024, batchSize: 512, threads});
const sequence = context.getSequence();
answer({about: {"node-llama-cpp": version, "llama.cpp": llama.llamaCppRelease.release}});

async function timed(tokens, count) {
  await sequence.clearHistory();
  const stamps = [performance.now()];
  for await (const _ of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
    stamps.push(performance.now());
    if (stamps.length > count) break;
  }
  const gaps = stamps.slice(1).map((stamp, i) => stamp - stamps[i]);
  return {ttft_ms: gaps[0], itl_ms: gaps.slice(1)};
}

async function writeLogits(windows, target) {
  const out = fs.openSync(target, "w");
  for (const window of windows) {
    await sequence.clearHistory();
    const read = window.slice(0, -1);
    for (let first = 0; first < read.length; first += AT_ONCE) {
      const asked = read.slice(first, first + AT_ONCE).map((token) => [token, {generateNext: {logits: true}}]);
      for (const {next} of await sequence.controlledEvaluate(asked)) {
        const row = new Float32Array(next.logits.size);
        for (const [token, logit] of next.logits) row[token] = logit;
        fs.writeSync(out, Buffer.from(row.buffer));
      }
    }
  }
  fs.closeSync(out);
  return {};
}

for await (const line of readline.createInterface({input: process.stdin})) {
  const request = JSON.parse(line);
  answer(request.windows ? await writeLogits(request.windows, request.file)
    : await timed(request.tokens, request.new_tokens));
}
process.exit(0);
