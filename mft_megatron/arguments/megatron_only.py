"""Options of Megatron-LM that this project does not have: the reason, and what to do instead.

A script for Megatron-LM is refused with this sentence; no option is ignored silently.
"""

# A sentence, and the options that it answers, without their dashes.
_SENTENCES = (
    # network
    (
        "models of this shape are not supported; leave it out",
        """
        activation-func-clamp-value attention-output-gate glu-linear-offset qk-clip qk-clip-alpha qk-clip-threshold
        qk-l2-norm quick-geglu softmax-type no-rope-freq multi-latent-attention experimental-attention-variant
        dsa-indexer-head-dim dsa-indexer-loss-coeff dsa-indexer-n-heads dsa-indexer-topk dsa-indexer-use-sparse-loss
        linear-conv-kernel-dim linear-key-head-dim linear-num-key-heads linear-num-value-heads linear-value-head-dim
        hybrid-attention-ratio hybrid-mlp-ratio hybrid-override-pattern is-hybrid-model mamba-head-dim mamba-num-groups
        mamba-num-heads mamba-state-dim disable-mamba-mem-eff-path mrope-section relative-attention-max-distance
        relative-attention-num-buckets bert-no-binary-head encoder-num-layers decoder-num-layers spec
        moe-latent-size moe-apply-probs-on-input log-max-attention-logit
    """,
    ),
    (
        "models that predict several tokens ahead are not supported; leave it out",
        "mtp-loss-scaling-factor mtp-num-layers mtp-standalone",
    ),
    ("Megatron-Core does not read it; leave it out", "apply-residual-connection-post-layernorm onnx-safe"),
    (
        "every attention kernel here computes softmax in fp32; leave it out",
        "attention-softmax-in-fp32 apply-query-key-layer-scaling",
    ),
    ("give --position-embedding-type rope", "use-rotary-position-embeddings"),
    ("give --position-embedding-type none", "no-position-embedding"),
    ("give --rope-scaling with the entry of the model's config.json", "use-rope-scaling rope-scaling-factor rope-type"),
    (
        "the vocabulary is the data set's tokenizer's; leave it out",
        "padded-vocab-size vocab-extra-ids vocab-file merge-file",
    ),
    # training
    ("batches count packs and steps are counted: give --train-iters or --num-train-epochs", "train-samples"),
    ("schedules count optimizer steps: give --lr-decay-iters", "lr-decay-samples"),
    ("schedules count optimizer steps: give --lr-wsd-decay-iters", "lr-wsd-decay-samples"),
    ("schedules count optimizer steps: give --lr-warmup-iters", "lr-warmup-samples warmup"),
    ("give --micro-batch-size", "batch-size"),
    ("give --recompute-activations", "checkpoint-activations"),
    ("give --recompute-granularity selective --recompute-modules moe", "moe-layer-recompute"),
    ("all models here are Megatron-Core's; leave it out", "use-mcore-models use-legacy-models"),
    ("give --attention-backend flash", "use-flash-attn"),
    (
        "--cross-entropy-impl sets how losses are computed, and its default is fused; leave it out",
        "cross-entropy-loss-fusion cross-entropy-fusion-impl fp16-lm-cross-entropy",
    ),
    (
        "losses are normalised by tokens over the whole global batch as --mft-loss says; leave it out",
        "calculate-per-token-loss",
    ),
    (
        "a loss, gradient norm or validation loss that is not finite always ends the run; leave it out",
        "check-for-large-grads check-for-spiky-loss result-rejected-tracker-filename",
    ),
    ("a resumed run follows the data exactly, so no step can be skipped; leave it out", "iterations-to-skip"),
    (
        "batch sizes that do not divide evenly are refused with a size that does; choose that",
        "decrease-batch-size-if-needed",
    ),
    (
        "data-parallel ranks take the same steps, so their weights stay equal; leave it out",
        "check-weight-hash-across-dp-replicas-interval",
    ),
    (
        "use an external profiler, e.g. nsys profile or py-spy record; leave it out",
        """
        profile profile-ranks profile-step-end profile-step-start use-pytorch-profiler record-memory-history
        memory-snapshot-path config-logger-dir
    """,
    ),
    (
        "CUDA graphs are not supported: packs differ from step to step; leave it out",
        """
        cuda-graph-impl cuda-graph-warmup-steps enable-cuda-graph external-cuda-graph
        moe-pad-experts-for-cuda-graph-inference
    """,
    ),
    (
        "it is for inference; leave it out",
        """
        flash-decode inference-fuse-tp-communication inference-rng-tracker mlp-chunks-for-prefill batch-invariant-mode
    """,
    ),
    (
        "nothing here uses it; leave it out",
        """
        no-bias-gelu-fusion no-masked-softmax-fusion no-persist-layer-norm no-rope-fusion use-te-activation-func
        use-fused-weighted-squared-relu empty-unused-memory-level train-sync-interval
        disable-bf16-reduced-precision-matmul symmetric-ar-type test-mode enable-experimental dataloader-type
        no-create-attention-mask-in-dataloader exit-signal-handler-for-dataloader num-dataset-builder-threads
        num-workers dataloader-defer-npy-index-mmap dataloader-fast-cache-load no-mmap-bin-files
        object-storage-cache-path mid-level-dataset-surplus data-cache-path
    """,
    ),
    (
        "give --optimizer adam or sgd",
        """
        muon-extra-scale-factor muon-fp32-matmul-prec muon-momentum muon-no-split-qkv muon-num-ns-steps muon-scale-mode
        muon-tp-mode muon-use-nesterov
    """,
    ),
    (
        "norms and biases have no weight decay; for q/k norms there is --apply-wd-to-qk-layernorm",
        "no-weight-decay-cond-type",
    ),
    (
        "with a GPU the optimizer's memory on the CPU is pinned; leave it out",
        "no-pin-cpu-grads no-pin-cpu-params",
    ),
    (
        "for less memory give --recompute-granularity, or --optimizer-cpu-offload",
        """
        cpu-offloading-num-layers fine-grained-activation-offloading offload-modules min-offloaded-tensor-size
    """,
    ),
    ("parameter groups are named in the checkpoint; leave it out", "dump-param-to-param-group-map"),
    # initialization
    (
        "initial weights depend only on the seed; leave it out",
        """
        use-cpu-initialization no-initialization te-rng-tracker data-parallel-random-init init-model-with-meta-device
    """,
    ),
    # learning rate
    (
        "the schedule follows the command line, and the checkpoint only sets its step; leave it out",
        """
        override-opt-param-scheduler use-checkpoint-opt-param-scheduler
    """,
    ),
    # checkpointing
    ("the architecture always comes from the checkpoint of --load; leave it out", "use-checkpoint-args"),
    (
        "any parallel layout loads the checkpoint of another one: give the layout of this run",
        "use-mp-args-from-checkpoint-args",
    ),
    (
        "the tokenizer is that of the data set; leave it out",
        """
        disable-use-tokenizer-model-from-checkpoint-args no-use-tokenizer-model-from-checkpoint-args legacy-tokenizer
        tiktoken-num-special-tokens tiktoken-pattern tiktoken-special-tokens tokenizer-hf-include-special-tokens
        tokenizer-hf-use-fast tokenizer-metadata tokenizer-sentencepiece-legacy tokenizer-special-tokens
        trust-remote-code
    """,
    ),
    (
        "checkpoints are torch_dist, see --ckpt-format; leave it out",
        """
        auto-detect-ckpt-format ckpt-convert-format ckpt-convert-save ckpt-convert-update-legacy-dist-opt-format
        dist-ckpt-format dist-ckpt-save-pre-mcore-014 use-dist-ckpt disable-strict-fsdp-dtensor-load
        no-strict-fsdp-dtensor-load
    """,
    ),
    ("it is the default; leave it out", "ckpt-fully-parallel-save"),
    ("give --no-ckpt-fully-parallel-save", "disable-ckpt-fully-parallel-save"),
    ("a checkpoint without all weights of the model is refused; leave it out", "dist-ckpt-strictness"),
    ("plans of saves are kept while they hold, which each save checks; leave it out", "ckpt-assume-constant-structure"),
    (
        "give --async-save; there are no local checkpoints and no persistent writers",
        """
        use-persistent-ckpt-worker non-persistent-ckpt-type non-persistent-global-ckpt-dir
        non-persistent-local-ckpt-algo non-persistent-local-ckpt-dir non-persistent-save-interval replication
        replication-factor replication-jump
    """,
    ),
    ("gradients are not saved; leave it out", "save-dgrads-interval save-wgrads-interval"),
    (
        "main weights are loaded with the optimizer's state; leave it out",
        """
        load-main-params-from-ckpt distrib-optim-fully-reshardable-mem-efficient
    """,
    ),
    # mixed precision
    (
        "fp8 has the options --fp8-* that --help lists; leave it out",
        """
        fp4-format fp4-param-gather fp4-quantizer-factory fp4-recipe fp8-interval fp8-quantizer-factory
        keep-fp8-transpose-cache kitchen-attention-backend use-kitchen-attention te-precision-config-file
        reuse-grad-buf-for-mxfp8-param-ag moe-router-padding-for-fp8 moe-router-padding-for-quantization
    """,
    ),
    ("give --no-fp8-wgrad", "disable-fp8-wgrad"),
    # distributed
    ("give --tensor-model-parallel-size", "model-parallel-size"),
    (
        "torchrun and --distributed-backend set up the process groups; leave it out",
        """
        local-rank lazy-mpu-init disable-gloo-process-groups pipeline-model-parallel-comm-backend fake-process-group
        nccl-communicator-config-path high-priority-stream-groups use-tp-pp-dp-mapping use-sharp sharp-enabled-group
        create-all-gather-group use-nccl-ub disable-symmetric-registration suggested-communication-unit-size
    """,
    ),
    (
        "the start has a longer timeout by itself: give --distributed-timeout-minutes, that of steps",
        "distributed-timeout-seconds-after-init",
    ),
    (
        "FSDP is not supported: shard with --use-distributed-optimizer and model parallelism",
        """
        use-megatron-fsdp use-torch-fsdp2 torch-fsdp2-no-reshard-after-forward data-parallel-sharding-strategy
        outer-dp-sharding-strategy enable-full-sharding-in-hsdp fsdp-double-buffer fsdp-manual-registration
    """,
    ),
    (
        "gradients are summed, never divided by ranks; leave it out",
        """
        no-gradient-reduce-div-fusion ddp-reduce-scatter-with-fp32-accumulation
    """,
    ),
    ("give --overlap-param-gather", "overlap-param-gather-with-optimizer-step"),
    (
        "interleaved stages always overlap communication, others never, which works on every backend; leave it out",
        """
        no-overlap-p2p-communication overlap-p2p-communication-warmup-flush use-ring-exchange-p2p
        microbatch-group-size-per-virtual-pipeline-stage no-scatter-gather-tensors-in-pipeline
    """,
    ),
    (
        "tensor-parallel communication is not overlapped here; leave it out",
        """
        tp-comm-overlap tp-comm-overlap-cfg tp-comm-overlap-rs-dgrad tp-comm-bootstrap-backend
        disable-tp-comm-bulk-dgrad disable-tp-comm-bulk-wgrad disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs
        disable-tp-comm-split-ag disable-tp-comm-split-rs no-tp-comm-bulk-dgrad no-tp-comm-bulk-wgrad
        no-tp-comm-overlap-ag no-tp-comm-overlap-rs
        no-tp-comm-split-ag no-tp-comm-split-rs disable-async-tensor-model-parallel-allreduce
        no-async-tensor-model-parallel-allreduce defer-embedding-wgrad-compute wgrad-deferral-limit delay-wgrad-compute
        disable-clone-scatter-output-in-embedding no-clone-scatter-output-in-embedding
    """,
    ),
    (
        "context parallelism splits the packed stream evenly: give only --context-parallel-size",
        """
        hierarchical-context-parallel-sizes hybrid-context-parallel max-seqlen-per-dp-cp-rank
    """,
    ),
    # experts
    ("give --expert-tensor-parallel-size", "moe-extended-tp"),
    (
        "give a --moe-token-dispatcher-type that --help lists; leave it out",
        """
        moe-deepep-num-sms moe-enable-deepep moe-flex-dispatcher-backend moe-hybridep-num-sms
        overlap-moe-expert-parallel-comm ep-overlap-early-attn-memory-release
    """,
    ),
    (
        "--help lists the options of routing and experts; leave it out",
        """
        moe-enable-routing-replay moe-router-force-load-balancing moe-router-fusion moe-use-legacy-grouped-gemm
        moe-upcycling-granularity moe-use-upcycling
    """,
    ),
    # validation and data
    (
        "each evaluation reports a separate loss for every task of the validation split; leave it out",
        "multiple-validation-sets",
    ),
    ("tools/preprocess_data.py makes the split: give it --split", "split"),
    (
        "tools/preprocess_data.py makes one data set with its splits: give --data-path",
        """
        train-data-path valid-data-path test-data-path data-args-path per-split-data-args-path
        per-dataset-sequences-path phase-transition-iterations
    """,
    ),
    ("positions always restart with each sample; leave it out", "reset-position-ids"),
    ("a sample never attends to other samples of its pack; leave it out", "reset-attention-mask"),
    ("the data set stores which tokens have a loss, from the chat template; leave it out", "eod-mask-loss"),
    ("padding is by position; leave it out", "allow-ambiguous-pad-tokens"),
    ("give --seq-length", "encoder-seq-length decoder-seq-length"),
    ("tools/preprocess_data.py sets how often tasks are used: give it --task-sampling", "sample-rate"),
    ("it is for models of a different kind; leave it out", "mask-prob short-seq-prob"),
    (
        "give tools/preprocess_data.py a task with fill-in-the-middle, see its --help",
        """
        fim-data fim-eod-token fim-fragment-rate fim-middle-token fim-no-prefix fim-pad-token fim-prefix-token fim-rate
        fim-split-sample fim-spm-rate fim-suffix-token
    """,
    ),
    (
        "this program always fine-tunes on conversations; leave it out, and see --mft-loss",
        "sft sft-tokenizer-prompt-format",
    ),
    # logging
    (
        "metrics.jsonl has time, loss scale and events of every logged step; leave it out",
        """
        log-progress log-timers-to-tensorboard timing-log-level timing-log-option no-barrier-with-level-1-timing
        disable-log-loss-scale-to-tensorboard no-log-loss-scale-to-tensorboard log-energy logging-level
    """,
    ),
    ("give --log-memory-to-tensorboard", "log-memory-interval log-device-memory-used"),
)

MEGATRON_ONLY: dict[str, str] = {f"--{name}": sentence for sentence, names in _SENTENCES for name in names.split()}
