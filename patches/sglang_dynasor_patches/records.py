"""The ledger: one record per hook. `make readme` prints it into patches/README.md."""

from __future__ import annotations

from sglang_dynasor_patches.patch import Patch

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_ARGS = "sglang.srt.server_args.ServerArgs"
_ENGINE = "sglang.srt.entrypoints.engine.Engine"
_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_FLAG = "sglang_dynasor.engine.flag"
_HOOKS = "sglang_dynasor.engine.hooks"
_FRONT = "sglang_dynasor.engine.front"
_PAGE = "sglang_dynasor.engine.page"
_VALIDATION = "sglang_dynasor.engine.validation"
_PLACE = "sglang_dynasor.engine.place"

FENCE = "sglang_dynasor.engine.fence.hook"  # the guard that a hook goes behind
MESSAGES = "sglang_dynasor.engine.messages.register"  # lets SGLang carry our types of messages
SERVER_ARGS = f"{_FLAG}.engine_server_args"  # makes the arguments of sgl.Engine

PATCHES: tuple[Patch, ...] = (
    Patch(
        f"{_ARGS}.add_cli_args", "after", ("parser",), f"{_FLAG}.add_cli_args", "flag",
        "adds --scheduler and --dynasor-* to every command line of SGLang",
        "SGLang lets a plugin declare options", is_fenced=False,
    ),
    Patch(
        f"{_ARGS}.from_cli_args", "around", ("cls", "args"), f"{_FLAG}.from_cli_args", "flag",
        "carries the checked options to every process, and stops the start-up if they cannot be served",
        "SGLang lets a plugin declare options", is_fenced=False,
    ),
    Patch(
        f"{_ENGINE}._launch_subprocesses", "after",
        ("cls", "server_args", "init_tokenizer_manager_func", "run_scheduler_process_func",
         "run_detokenizer_process_func", "port_args", "placement_group"),
        f"{_FRONT}.check_schedulers", "main",
        "stops the start-up if a scheduler process came up without the hooks, which SGLang would swallow",
        "SGLang reports failed plugins", is_fenced=False,
    ),
    Patch(
        "sglang.srt.entrypoints.http_server.launch_server", "before",
        ("server_args", "init_tokenizer_manager_func", "run_scheduler_process_func", "run_detokenizer_process_func",
         "execute_warmup_func", "launch_callback"),
        "sglang_dynasor.engine.routes.add_routes", "main",
        "serves what is under /dynasor",
        "SGLang lets a plugin add a router", is_fenced=False,
    ),
    Patch(
        "sglang.srt.utils.auth.add_api_key_middleware", "after", ("app", "api_key", "admin_api_key"), f"{_PAGE}.open_page", "main",
        "serves the live page's own files, which are the same on every server, to a browser that could not send a key",
        "SGLang lets a plugin mark a route as open",
    ),
    Patch(
        f"{_TOKENIZER}._validate_one_request", "after", ("self", "obj", "input_ids"), f"{_VALIDATION}.validate", "main",
        "answers a wrong dynasor field with HTTP 400 before anything is queued",
        "SGLang lets a plugin validate custom_params",
    ),
    Patch(
        f"{_TOKENIZER}._create_tokenized_object", "after",
        ("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"),
        "sglang_dynasor.engine.claims.claim", "main",
        "takes note of the ids and budgets of requests that all checks have accepted",
        "SGLang tells a plugin what it sends",
    ),
    Patch(
        f"{_TOKENIZER}._init_req_state", "before", ("self", "obj", "request"), f"{_PLACE}.check_place", "main",
        "answers a dynasor field at the wrong place, which SGLang would drop, with HTTP 400; gives requests their template's settings",
        "SGLang refuses keys that it does not know",
    ),
    Patch(
        "sglang.srt.entrypoints.http_server.generate_contract_error", "after", ("body",), f"{_PLACE}.say_place", "main",
        "where SGLang refuses a field in sampling_params as unknown, says where it belongs",
        "SGLang lets a plugin declare keys",
    ),
    Patch(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request", "around",
        ("self", "request", "raw_request"), "sglang_dynasor.engine.chat.convert", "main",
        "puts a template's text around a chat; OpenAI's reasoning_effort says how soon a long thought may be closed",
        "SGLang hands chats to plugins before it renders them",
    ),
    *(
        Patch(
            f"sglang.srt.entrypoints.ollama.serving.OllamaServing.{name}", "around", ("self", "request", "raw_request"),
            f"{_PLACE}.refuse_ollama", "main",
            "answers a dynasor field, which Ollama's API has no place for and SGLang would drop, with HTTP 400",
            "SGLang refuses keys that it does not know",
        )
        for name in ("handle_chat", "handle_generate")
    ),
    Patch(
        f"{_TOKENIZER}.update_request_meta_info", "around",
        ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
        f"{_FRONT}.add_record", "main",
        "puts the program's record into meta_info and what it really generated into usage",
        "customized_info may carry one value per request",
    ),
    Patch(
        f"{_TOKENIZER}.collect_metrics", "before", ("self", "state", "recv_obj", "i"), f"{_FRONT}.count_usage", "main",
        "SGLang's counters of tokens count those of all branches, not only of the one that answered",
        "SGLang counts what meta_info says",
    ),
    Patch(
        f"{_SCHEDULER}.init_request_dispatcher", "after", ("self",), f"{_HOOKS}.init_request_dispatcher", "scheduler",
        "hands our own messages, types that no client's bytes become, to the controller",
        "SGLang takes a plugin's message types", is_fenced=False,
    ),
    Patch(
        f"{_SCHEDULER}.init_schedule_policy", "after", ("self",), f"{_HOOKS}.init_schedule_policy", "scheduler",
        "gives the scheduler its controller of programs, its policy the same, and the model runner our sampling observer",
        "SGLang takes a scheduler class and a sampling observer from a plugin", is_fenced=False,
    ),
    Patch(
        f"{_SCHEDULER}.init_load_inquirer", "after", ("self",), f"{_HOOKS}.load_inquirer", "scheduler",
        "waiting programs count in the load that balancers and routers read (/v1/loads)",
        "SGLang asks a plugin what it holds outside its queue", is_fenced=False,
    ),
    Patch(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats", "before", ("self", "stats"),
        f"{_HOOKS}.log_stats", "scheduler",
        "waiting programs count in SGLang's gauge of its queue, and ours are set as often as SGLang's",
        "SGLang asks a plugin what it holds outside its queue",
    ),
    Patch(
        f"{_SCHEDULER}.run_batch", "before", ("self", "batch", "pp_proxy_tensors"), f"{_HOOKS}.run_batch", "scheduler",
        "tells the observer which rows of the step are watched; SGLang shows it no requests",
        "a sampling observer is shown the requests of its rows",
    ),
    Patch(
        "sglang.srt.managers.scheduler_components.batch_result_processor."
        "SchedulerBatchResultProcessor.consume_auxiliary_output", "around",
        ("cls", "batch", "output", "output_starts"), f"{_HOOKS}.consume", "scheduler",
        "reads the watched rows' statistics without a list of every row's new tokens: a fifth of what they cost",
        "SGLang lists new tokens for outputs that ask for them",
    ),
    Patch(
        f"{_SCHEDULER}._add_request_to_queue", "around", ("self", "req", "is_retracted"), f"{_HOOKS}.enqueue",
        "scheduler", "holds a program's own request and queues its branches instead",
        "SGLang takes a scheduler class from a plugin",
    ),
    Patch(
        f"{_SCHEDULER}.get_new_batch_prefill", "around", ("self", "running_batch"), f"{_HOOKS}.next_prefill",
        "scheduler", "starts the waiting programs that fit, before SGLang fills its prefill batch",
        "SGLang takes a scheduler class from a plugin",
    ),
    Patch(
        "sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority", "around",
        ("self", "waiting_queue", "running_batch", "processed_tokens"), f"{_HOOKS}.order_queue", "scheduler",
        "keeps started branches in front, and siblings together that LPM would defer",
        "SGLang takes a policy from a plugin",
    ),
    Patch(
        f"{_SCHEDULER}.get_prefill_adder_class", "after", ("self",), f"{_HOOKS}.prefill_adder", "scheduler",
        "keeps plain requests off rows and tokens that are promised to a gang",
        "never: this is SGLang's own extension point",
    ),
    Patch(
        f"{_SCHEDULER}._poll_timeout_aborts", "after", ("self",), f"{_HOOKS}.timeouts", "scheduler",
        "adds deadlines to what the first rank broadcasts: the one place where a decision reads a clock",
        "SGLang lets a plugin add to the broadcast",
    ),
    Patch(
        f"{_BATCH}._get_decode_retraction_order", "around", ("reqs",), f"{_HOOKS}.retraction_order", "scheduler",
        "retracts the youngest program first",
        "SGLang takes a retraction policy from a plugin",
    ),
    Patch(
        f"{_BATCH}.retract_decode", "around", ("self",), f"{_HOOKS}.retract", "scheduler",
        "retracts a program whole",
        "SGLang takes a retraction policy from a plugin",
    ),
    Patch(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.maybe_external_dp_rank_routing", "before",
        ("self", "req"), "sglang_dynasor.engine.routing.route_program", "router",
        "sends the branches of a client's program to one replica",
        "SGLang's data-parallel controller routes by routing_key",
    ),
    Patch(
        f"{_SCHEDULER}.get_output_streamer_class", "after", ("self",), f"{_HOOKS}.output_streamer", "scheduler",
        "keeps branches from the detokenizer and shows the controller what each step finished",
        "never: this is SGLang's own extension point", is_fenced=False,
    ),
    Patch(
        f"{_SCHEDULER}.abort_request", "before", ("self", "recv_req"), f"{_HOOKS}.abort_request", "scheduler",
        "an abort, time-out or disconnect of the client ends all branches",
        "SGLang takes a scheduler class from a plugin",
    ),
    Patch(
        f"{_SCHEDULER}.send_abort_output", "around", ("self", "abort_req", "req"), f"{_HOOKS}.send_abort_output",
        "scheduler", "a queued branch that SGLang gives up is told to its program, not to a client that never sent it",
        "SGLang takes a scheduler class from a plugin",
    ),
    Patch(
        f"{_SCHEDULER}.unload_lora_adapter", "before", ("self", "recv_req"), f"{_HOOKS}.unload_lora", "scheduler",
        "lets branches of a program that is answered end without an adapter that SGLang takes out of memory",
        "SGLang asks a plugin which adapters it still uses",
    ),
    Patch(
        f"{_SCHEDULER}.get_init_info", "after", ("self",), f"{_HOOKS}.init_info", "scheduler",
        "tells the main process that the hooks are live in this scheduler",
        "SGLang reports failed plugins", is_fenced=False,
    ),
    Patch(
        f"{_SCHEDULER}.get_internal_state", "after", ("self", "recv_req"), f"{_HOOKS}.internal_state", "scheduler",
        "reports programs in /server_info",
        "SGLang lets a plugin report its state",
    ),
)  # fmt: skip
