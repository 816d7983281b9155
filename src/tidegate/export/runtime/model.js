// One step of a recurrent model at a time. Made by tidegate.
//
//     import { load } from "./@NAME@.js";
//     const model = await load();
//     const stream = model.stream();          // any number of them, each with a state of its own
//     const y = stream.step(x);               // Float32Array of inputSize to one of outputSize
//     const ys = stream.process(xs);          // (steps, inputSize) to (steps, outputSize), both flat
//     stream.reset();
//     const saved = stream.state;             // Float32Array(stateSize), to be kept; stream.state = saved

export const inputSize = @INPUT@, outputSize = @OUTPUT@, stateSize = @STATE@;

/** Load the model: from `@NAME@.wasm` beside this file, or from a URL, a Response or the file's bytes. */
export async function load(source = new URL("./@NAME@.wasm", import.meta.url)) {
    if (source instanceof URL && source.protocol === "file:") {
        const { readFile } = await import("node:fs/promises");
        source = await readFile(source);
    } else if (source instanceof URL || typeof source === "string") {
        source = await fetch(source);
    }
    const bytes = typeof Response !== "undefined" && source instanceof Response ? await source.arrayBuffer() : source;
    const { instance } = await WebAssembly.instantiate(bytes, {});
    return new Model(instance.exports);
}

class Model {
    constructor(functions) {
        this.functions = functions;
        this.memory = functions.memory;
        this.end = (functions.__heap_base.value + 15) & ~15;
        this.room = { steps: 0, x: 0, y: 0 };
    }

    /** A stream before its first step. */
    stream() {
        return new Stream(this, this.take(stateSize));
    }

    /** The address of so many floats. */
    take(count) {
        const address = this.end;
        this.end += (4 * count + 15) & ~15;
        const missing = this.end - this.memory.buffer.byteLength;
        if (missing > 0) this.memory.grow(Math.ceil(missing / 65536));
        return address;
    }

    /** Where a block of so many steps goes in and comes out. */
    block(steps) {
        if (steps > this.room.steps) {
            this.room = { steps, x: this.take(steps * inputSize), y: this.take(steps * outputSize) };
        }
        return this.room;
    }

    floats(address, count) {
        return new Float32Array(this.memory.buffer, address, count);
    }
}

class Stream {
    constructor(model, address) {
        this.model = model;
        this.address = address;
        this.reset();
    }

    reset() {
        this.model.functions.@NAME@_reset(this.address);
    }

    step(x) {
        if (x.length !== inputSize) throw new RangeError(`x: expected ${inputSize} numbers, got ${x.length}`);
        const { x: from, y: to } = this.model.block(1);
        this.model.floats(from, inputSize).set(x);
        this.model.functions.@NAME@_step(this.address, from, to);
        return this.model.floats(to, outputSize).slice();
    }

    process(xs) {
        const steps = xs.length / inputSize;
        if (!Number.isInteger(steps)) {
            throw new RangeError(`xs: expected a multiple of ${inputSize} numbers, got ${xs.length}`);
        }
        const { x: from, y: to } = this.model.block(steps);
        this.model.floats(from, xs.length).set(xs);
        this.model.functions.@NAME@_process(this.address, from, to, @MARKS@steps);
        return this.model.floats(to, steps * outputSize).slice();
    }

    get state() {
        return this.model.floats(this.address, stateSize).slice();
    }

    set state(values) {
        if (values.length !== stateSize) {
            throw new RangeError(`state: expected ${stateSize} numbers, got ${values.length}`);
        }
        this.model.floats(this.address, stateSize).set(values);
    }
}
