"""What the demo model knows about raytier."""

from typing import Final

ABOUT_RAYTIER: Final = (
    "raytier serves language models that are larger than the fastest memory of your machine. "
    "It spreads the weights over GPU memory, RAM and disk and streams them in time for each step."
)

# (names of the topic, "is" or "are", answer)
TOPICS: Final[tuple[tuple[tuple[str, ...], str, str], ...]] = (
    (("raytier", "this project", "the raytier project"), "is", ABOUT_RAYTIER),
    (
        ("a tier", "a memory tier", "the word tier"),
        "is",
        "A tier is a kind of memory where weights can live. raytier has four: device, host, ramdisk and nvme.",
    ),
    (
        ("the tiers", "the memory tiers", "the four tiers"),
        "are",
        "The tiers are, fastest first: device, host, ramdisk and nvme.",
    ),
    (
        ("the device tier", "device memory"),
        "is",
        "The device tier is GPU memory, or the memory of the compute process itself on a machine without a GPU.",
    ),
    (("the host tier", "host memory"), "is", "The host tier is a shared pool of RAM on the node."),
    (
        ("the ramdisk tier", "a ramdisk"),
        "is",
        "The ramdisk tier is a tmpfs directory, a file system that lives in RAM.",
    ),
    (
        ("the nvme tier", "the disk tier"),
        "is",
        (
            "The nvme tier is one or more directories on fast disks. With several, large parameters "
            "are striped across them."
        ),
    ),
    (
        ("the planner", "the raytier planner"),
        "is",
        (
            "The planner decides in which tier every parameter lives. It chooses the plan with the "
            "lowest predicted step time."
        ),
    ),
    (
        ("a plan", "a weight plan"),
        "is",
        "A plan says for every parameter its tier, actor, precision and codec, and it predicts how long a step takes.",
    ),
    (
        ("the ring", "the ring buffer"),
        "is",
        "The ring is a set of reused memory slots. Weights arrive in it from disk just before a layer needs them.",
    ),
    (
        ("a ring slot", "a slot of the ring"),
        "is",
        "A ring slot is a piece of memory that holds weights on their way to a layer.",
    ),
    (
        ("prefetching", "the prefetch"),
        "is",
        "Prefetching means reading the weights of the next layers while the current layer is still computing.",
    ),
    (
        ("the prefetch window", "the window of the prefetch"),
        "is",
        "The prefetch window is the number of layers that are read ahead. By default the plan chooses it.",
    ),
    (("a sweep", "the word sweep"), "is", "A sweep is one pass over all layers of the model."),
    (
        ("a step", "an engine step"),
        "is",
        "A step is one round of the scheduler: every running sequence moves forward once.",
    ),
    (
        ("a KV block", "a block of the KV cache"),
        "is",
        "A KV block holds the keys and values of a few tokens, sixteen by default.",
    ),
    (
        ("the KV cache", "the key value cache"),
        "is",
        "The KV cache keeps the keys and values of earlier tokens, so that they need not be computed again.",
    ),
    (
        ("paged KV", "paged attention"),
        "is",
        "Paged KV means that the KV cache is kept in small blocks, and each sequence has a table of its blocks.",
    ),
    (
        ("a block table", "the block table"),
        "is",
        "A block table lists the KV blocks that belong to a sequence, in order.",
    ),
    (
        ("the prefix cache", "prefix caching"),
        "is",
        (
            "The prefix cache finds KV blocks of a prompt that was seen before, so that its start "
            "need not be computed again."
        ),
    ),
    (
        ("copy-on-write", "copy on write"),
        "is",
        "Copy-on-write means that sequences share KV blocks, and a block is copied only when one of them writes to it.",
    ),
    (
        ("swapping", "KV swapping"),
        "is",
        "Swapping moves KV blocks from the device to host memory or disk and back, together with their data.",
    ),
    (
        ("memory pressure", "KV pressure"),
        "is",
        "Pressure tells how few KV blocks are free. Below 0.3 it is high, and below 0.1 it is critical.",
    ),
    (
        ("the KVBlockActor", "the KV block actor"),
        "is",
        "The KVBlockActor tracks paged KV allocations. It owns the capacity and leases blocks to the engines.",
    ),
    (
        ("the DeviceActor", "the device actor"),
        "is",
        "The DeviceActor stands for one GPU or one CPU compute device. It holds weights, the ring and the KV cache.",
    ),
    (
        ("the HostPoolActor", "the host pool actor"),
        "is",
        "The HostPoolActor owns the shared RAM pool of a node. There is one per node.",
    ),
    (
        ("the DiskTierActor", "the disk tier actor"),
        "is",
        "The DiskTierActor owns the files of a disk tier: their budget, writes, checks and health.",
    ),
    (
        ("the Ray actors", "the actors of raytier"),
        "are",
        "Ray actors stand for the real resources: each device, each RAM pool and each disk tier has one.",
    ),
    (
        ("Ray", "the Ray framework"),
        "is",
        "Ray is a framework for distributed Python. raytier uses its actors and placement groups.",
    ),
    (
        ("Ray Serve", "the Serve library"),
        "is",
        "Ray Serve is the part of Ray that answers requests. raytier runs as a Serve application.",
    ),
    (
        ("the LLMServer", "the LLM server deployment"),
        "is",
        "The LLMServer is the Serve deployment that answers requests. It is the home of the engines.",
    ),
    (
        ("the engine", "the raytier engine"),
        "is",
        "The engine runs the step loop of a model: it schedules sequences and hands out tokens.",
    ),
    (("the scheduler", "the engine scheduler"), "is", "The scheduler decides which sequences run in the next step."),
    (
        ("continuous batching", "the continuous batch"),
        "is",
        "Continuous batching lets new requests join the running batch at every step.",
    ),
    (
        ("chunked prefill", "a prefill chunk"),
        "is",
        "Chunked prefill cuts a long prompt into pieces, so that other requests do not have to wait for it.",
    ),
    (
        ("a placement group", "the placement group"),
        "is",
        "A placement group reserves resources in Ray. raytier turns its budgets into one when the application starts.",
    ),
    (
        ("a budget", "the tier budget"),
        "is",
        "A budget says how much of a tier raytier may use: reserved bytes, a maximum share and an absolute cap.",
    ),
    (
        ("int8 precision", "the int8 format"),
        "is",
        "int8 stores weights as 8 bit integers with one scale per output channel.",
    ),
    (
        ("int4 precision", "the int4 format"),
        "is",
        "int4 stores weights as 4 bit integers in groups of 32, 64 or 128.",
    ),
    (
        ("source precision", "the precision called source"),
        "is",
        "Source precision keeps the weights exactly as they are in the checkpoint. It is the default.",
    ),
    (
        ("quantisation", "quantization"),
        "is",
        "Quantisation stores weights with fewer bits. In raytier it is off unless you ask for it.",
    ),
    (
        ("compression", "weight compression"),
        "is",
        "Compression makes the bytes on disk smaller without loss. raytier can use zstd and zstd-planes.",
    ),
    (
        ("zstd-planes", "the zstd-planes codec"),
        "is",
        "zstd-planes splits the weights into byte planes and then compresses them with zstd. It is lossless.",
    ),
    (
        ("a transfer", "a layer transfer"),
        "is",
        "A transfer moves a parameter or a layer to another tier while generation goes on.",
    ),
    (
        ("the tier map", "the tier map page"),
        "is",
        "The tier map is a web page that shows live where every layer lives and what moves.",
    ),
    (
        ("the arena", "the host arena"),
        "is",
        "The arena is the shared memory of the host pool. All processes of a node can map it.",
    ),
    (
        ("O_DIRECT", "direct disk access"),
        "is",
        "O_DIRECT reads from disk without the page cache. raytier uses it to read weights at full speed.",
    ),
    (
        ("a checksum", "the checksums"),
        "is",
        "A checksum proves that bytes read from disk are right before they are computed on.",
    ),
    (
        ("speculation", "speculative decoding"),
        "is",
        "Speculation guesses several tokens cheaply and checks them in one sweep. The output stays the same.",
    ),
    (
        ("the model registry", "models.yaml"),
        "is",
        "The model registry is the file models.yaml. It lists the models that raytier may load.",
    ),
    (
        ("safetensors", "the safetensors format"),
        "is",
        "safetensors is a safe file format for weights. raytier reads it by byte range.",
    ),
    (
        ("the Ray dashboard", "the dashboard of Ray"),
        "is",
        "The Ray dashboard is a web page that shows nodes and actors. Every raytier actor has a clear name there.",
    ),
    (
        ("the demo model", "the model called demo"),
        "is",
        "The demo model is me: a very small Llama-shaped model, so that raytier works without a network.",
    ),
    (
        ("a token", "the word token"),
        "is",
        "A token is a small piece of text, such as a word or part of a word. Models read and write tokens.",
    ),
    (("a layer", "a decoder layer"), "is", "A layer is one decoder layer of the model. It is the unit of streaming."),
    (
        ("streaming weights", "weight streaming"),
        "is",
        "Weight streaming reads the weights of a layer from a slower tier in time for its use.",
    ),
    (
        ("a sleeping model", "the status sleeping"),
        "is",
        "A sleeping model has moved to a lower tier. It wakes when it is needed.",
    ),
    (
        ("the OpenAI API", "the OpenAI compatible API"),
        "is",
        "raytier answers the OpenAI routes, such as /v1/chat/completions and /v1/models.",
    ),
)

# (ways to name the action, answer)
HOWTOS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        ("start the server", "start raytier", "run raytier", "launch the server"),
        "Run `make serve`, or `serve run serve_configs/llm.yaml`.",
    ),
    (
        ("stop the server", "stop raytier", "shut down the server"),
        "Press Ctrl-C where it runs, or use `serve shutdown`.",
    ),
    (
        ("see the plan", "print the plan", "look at the plan before loading"),
        "Run `raytier plan MODEL`. It prints the plan before anything is loaded.",
    ),
    (
        ("check my hardware", "measure my machine", "measure my disks"),
        "Run `raytier doctor`. It measures your memory, disks and devices.",
    ),
    (
        ("watch the server", "see what the server does live", "follow the running server"),
        "Run `raytier top`, or open the tier map page.",
    ),
    (("measure the speed", "run a benchmark", "benchmark a model"), "Run `raytier bench`."),
    (
        ("move a layer to another tier", "transfer a layer", "move a layer to disk"),
        "Use `raytier transfer`, or POST to /api/layers/transfer. It works while generation goes on.",
    ),
    (
        ("load a model", "load another model"),
        "POST to /api/models/load with the model name. The answer is 202, and loading goes on.",
    ),
    (("unload a model", "free a model"), "POST to /api/models/unload with the model name."),
    (("list the models", "see which models there are"), "GET /v1/models, or run `raytier models`."),
    (
        ("call the server from Python", "use the OpenAI client", "use the API from Python"),
        "Use any OpenAI client with the base URL http://127.0.0.1:8000/v1.",
    ),
    (("send a chat request", "chat with the model"), "POST your messages to /v1/chat/completions."),
    (("get streamed answers", "stream the output", "stream tokens"), "Set `stream` to true in the request."),
    (
        ("limit the memory", "set a memory budget", "cap the memory of a tier"),
        "Set `max_mb` for the tier under `tiers` in the configuration.",
    ),
    (
        ("turn on quantisation", "use int8 weights", "use fewer bits"),
        "Set the precision of the tier under `precision` in the configuration.",
    ),
    (
        ("turn on compression", "compress the weights on disk"),
        "Set `default` under `compression` in the configuration, for example to auto.",
    ),
    (
        ("protect the server with a key", "set an API key", "use an API key"),
        "Set the environment variable RAYTIER_API_KEY.",
    ),
    (("use raytier without HTTP", "use raytier offline", "run offline batches"), "Use `raytier.LLM(...)` in Python."),
    (("see the status", "check the status of the server"), "GET /api/status."),
    (("see where the layers are", "find out where a layer lives"), "GET /api/layers, or open the tier map page."),
    (
        ("add a model", "register a model"),
        "Add an entry to models.yaml, with model_id, source_type, source_path and model_format.",
    ),
    (
        ("use several disks", "stripe over two disks"),
        "List several paths under `tiers.nvme.paths`. Large parameters are striped across them.",
    ),
    (
        ("use a ramdisk", "turn on the ramdisk"),
        "Set `enabled` to true under `tiers.ramdisk`. It is used only when you ask for it.",
    ),
    (
        ("place a parameter by hand", "pin a parameter to a tier"),
        "Add a rule with a pattern and a tier under `placement.rules`.",
    ),
    (("see the metrics", "get Prometheus metrics"), "GET /metrics. It uses the usual Prometheus format."),
    (("read the API docs", "find the API documentation"), "Open /api/docs in your browser."),
    (
        ("get the same output every time", "make the output reproducible"),
        "Set a `seed` in the request, or use temperature 0.",
    ),
)

# (what it can do, answer)
ABILITIES: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (("run without a GPU", "work on a CPU only machine"), "Yes. A machine without a GPU is a full citizen in raytier."),
    (("run without a network", "work offline"), "Yes. The demo model is part of the package, so no network is needed."),
    (
        ("serve a model that is larger than memory", "run a model larger than my GPU"),
        "Yes. That is what raytier is for: what does not fit is streamed from RAM or disk.",
    ),
    (
        ("run on several nodes", "use more than one machine"),
        "Yes. Several nodes are the same program, and each gets a range of layers.",
    ),
    (("use several GPUs", "run on two GPUs"), "Yes. The planner gives every GPU a range of layers."),
    (
        ("serve several models at once", "hold more than one model"),
        "Yes. Models share the devices, and idle models sleep in a lower tier.",
    ),
    (
        ("answer many requests at once", "handle parallel requests"),
        "Yes. With continuous batching one sweep serves every running request.",
    ),
    (
        ("read GGUF files", "load a GGUF model"),
        "No. raytier reads safetensors and PyTorch weights, and it refuses GGUF.",
    ),
    (("read ONNX files", "load an ONNX model"), "No. ONNX files are refused with a message that says so."),
    (("run BERT", "serve an encoder model"), "No. raytier serves causal language models only."),
    (
        ("run mixture-of-experts models", "serve a mixture of experts"),
        "Yes. Experts are separate parameters, and only the routed ones are fetched.",
    ),
    (
        ("change the answers of a model", "make a model worse"),
        "No. With lossless tiers the greedy output is the same as that of transformers.",
    ),
    (
        ("check for damaged files", "notice a corrupted file"),
        "Yes. Bytes read from disk are checked before they are computed on.",
    ),
    (
        ("survive a crash", "recover when an actor dies"),
        "Yes. Requests continue with the same tokens or end with a clear error.",
    ),
    (("produce JSON", "return structured output"), "Yes. Use `response_format` with a JSON schema."),
    (("call tools", "use tool calls"), "Yes. Tools work as in the OpenAI API."),
    (("cancel a request", "stop a running request"), "Yes. Cancellation frees everything within one step."),
    (
        ("forward requests to another server", "act as a proxy"),
        "Yes. Models it does not hold can be forwarded to an OpenAI compatible server.",
    ),
    (
        ("share a prompt between requests", "reuse a common prompt"),
        "Yes. The prefix cache shares the KV blocks of a common start.",
    ),
)

# (phrasings, answer): facts that fit no pattern
FREE_FACTS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        (
            "How many tiers are there?",
            "How many tiers does raytier have?",
            "What is the number of tiers?",
            "How many memory tiers are there in raytier?",
            "Tell me how many tiers raytier has.",
            "How many kinds of memory does raytier use?",
        ),
        "There are four tiers: device, host, ramdisk and nvme.",
    ),
    (
        (
            "Which tier is the fastest?",
            "What is the fastest tier?",
            "Name the fastest tier.",
            "Tell me which tier is fastest.",
            "Which tier has the highest speed?",
            "What tier is the quickest?",
        ),
        "The device tier is the fastest.",
    ),
    (
        (
            "Which tier is the slowest?",
            "What is the slowest tier?",
            "Name the slowest tier.",
            "Tell me which tier is slowest.",
            "Which tier has the lowest speed?",
            "What tier is the least fast?",
        ),
        "The nvme tier is the slowest, but it is also the largest.",
    ),
    (
        (
            "Who is raytier for?",
            "Who uses raytier?",
            "Who should use raytier?",
            "For whom is raytier made?",
            "Who needs raytier?",
            "What kind of people use raytier?",
        ),
        "raytier is for people whose model is larger than their fastest memory, and for teams that already run Ray.",
    ),
    (
        (
            "Why is raytier useful?",
            "Why should I use raytier?",
            "What is raytier good for?",
            "Why would anyone use raytier?",
            "What are the benefits of raytier?",
            "What is the point of raytier?",
        ),
        "With raytier you can run a large model on a small machine, at the full speed of its disks.",
    ),
    (
        (
            "How does raytier work?",
            "How does it work?",
            "Explain how raytier works.",
            "Tell me how raytier works.",
            "Can you explain how raytier works?",
            "How does raytier do it?",
            "In what way does raytier work?",
        ),
        (
            "A planner gives every parameter a tier. While one layer computes, the weights of the "
            "next ones are read into the ring."
        ),
    ),
    (
        (
            "Which port does the server use?",
            "On which port does raytier listen?",
            "What is the port of the server?",
            "What port is used?",
            "Tell me the port of the server.",
            "Which port should I connect to?",
        ),
        "The server listens on port 8000.",
    ),
    (
        (
            "What happens if the model does not fit?",
            "What if my model does not fit?",
            "What does raytier do when a budget is too small?",
            "What happens when memory is too small for the model?",
            "What if the budget is too small?",
            "What happens if there is not enough memory?",
        ),
        (
            "The plan is refused, with the bytes needed, the bytes available and the smallest change "
            "that would make it fit."
        ),
    ),
    (
        (
            "What happens if the model fits?",
            "What if my model fits into GPU memory?",
            "Is a model that fits offloaded?",
            "What does raytier do with a model that fits?",
            "What happens when everything fits in memory?",
            "Does raytier offload a small model?",
        ),
        "A model that fits is never offloaded.",
    ),
    (
        (
            "What is the default block size?",
            "How large is a KV block?",
            "How many tokens are in a block?",
            "What size does a KV block have?",
            "How many tokens does a KV block hold?",
            "Tell me the block size.",
        ),
        "A KV block holds sixteen tokens by default.",
    ),
    (
        (
            "Which command starts the server?",
            "What is the start command?",
            "Give me the command that starts raytier.",
            "What do I type to start raytier?",
            "Which command do I need to run raytier?",
            "What should I run first?",
        ),
        "Run `make serve`, or `serve run serve_configs/llm.yaml`.",
    ),
    (
        (
            "Where are the models configured?",
            "Where do I configure models?",
            "In which file are the models?",
            "Which file lists the models?",
            "Where is the list of models kept?",
            "What file holds the model settings?",
        ),
        "The models are listed in models.yaml or in the Serve configuration.",
    ),
    (
        (
            "What language is raytier written in?",
            "In which language is raytier written?",
            "Which programming language does raytier use?",
            "Is raytier written in Python?",
            "What is raytier written in?",
            "What programming language is raytier made with?",
        ),
        "raytier is written in Python, on top of Ray and PyTorch.",
    ),
    (
        (
            "How large is the demo model?",
            "How many parameters do you have?",
            "How big are you?",
            "What is your size?",
            "How many parameters does the demo model have?",
            "Tell me how big you are.",
        ),
        "I am tiny: I have about four million parameters.",
    ),
    (
        (
            "Which API does raytier speak?",
            "What API does the server offer?",
            "Which API can I use?",
            "Is raytier compatible with OpenAI?",
            "Does raytier have an OpenAI API?",
            "What kind of API is there?",
        ),
        "raytier speaks the OpenAI API, and it has routes of its own under /api.",
    ),
    (
        (
            "Are weights copied on disk?",
            "Does raytier need extra disk space?",
            "How much extra disk space does raytier need?",
            "Does raytier convert the model?",
            "Do I have to convert my model?",
            "Is there a conversion step?",
        ),
        "No. At source precision the weights are read straight from the original safetensors files.",
    ),
)
