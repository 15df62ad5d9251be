// Runs GGUF files in llama.cpp, as node-llama-cpp ships it: greedy tokens and tokenizations, all in float32.
// node llama_cpp.mjs JOBS.json ANSWERS.json, where JOBS.json is [{path, prompts, new_tokens, texts}].
import fs from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const jobs = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: LlamaLogLevel.error});
const answers = [];
for (const job of jobs) {
  try {
    const model = await llama.loadModel({modelPath: job.path});
    const context = await model.createContext({
      contextSize: 256, threads: 1, flashAttention: false,
      experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    });
    const sequence = context.getSequence();
    const tokens = [];
    for (const prompt of job.prompts) {
      await sequence.clearHistory();
      const ids = [];
      for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        ids.push(token);
        if (ids.length === job.new_tokens) break;
      }
      tokens.push(ids);
    }
    const {general, tokenizer} = model.fileInfo.metadata;
    answers.push({
      tokens, tokenized: job.texts.map((text) => model.tokenize(text, false)),
      architecture: general.architecture, chat_template: tokenizer.chat_template ?? null,
    });
    await context.dispose();
    await model.dispose();
  } catch (error) {
    answers.push({error: String(error)});
  }
}
fs.writeFileSync(process.argv[3], JSON.stringify(answers));
process.exit(0);
