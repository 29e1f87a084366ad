"""What the HTTP side is told at start, all of it explicit; cli.py fills it in."""

from dataclasses import dataclass, field

from eaglerun.messages import SamplingParams
from eaglerun.server.hosts import AllowedHosts

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may cost before it reaches the engine.

    max_body_seconds   a body must be here by then
    max_nesting        brackets and braces inside each other in a body
    max_prompt_chars   of all prompts of a request, after the chat template
    max_prompts        prompts of one completions request
    max_preparing      requests being rendered and tokenised at once; more are refused, and so
                       are more than max_preparing_bytes of them
    template_seconds   time one rendering of the chat template may take
    max_values         numbers, strings, lists and objects of a body, in all
    max_containers     of those, lists and objects
    max_rest_bytes     a large body without its prompt; max_rest_values likewise
    max_held_bytes     of all bodies that arrive or are being prepared
    prepare_seconds    time one preparation may take, template included; prepare_memory_bytes
                       likewise
    """

    max_body_bytes: int = 16 * MIB
    max_body_seconds: float = 60.0
    max_header_bytes: int = 32 * 1024
    max_nesting: int = 64
    max_prompt_chars: int = 8 * MIB
    max_prompts: int = 64
    max_n: int = 16
    max_stop: int = 16
    max_stop_chars: int = 256
    max_tools: int = 256
    max_preparing: int = 512
    template_seconds: float = 2.0
    max_preparing_bytes: int = 64 * MIB
    max_values: int = 1 << 21
    max_containers: int = 1 << 16
    max_rest_bytes: int = MIB
    max_rest_values: int = 20_000
    max_held_bytes: int = 256 * MIB
    prepare_seconds: float = 20.0
    prepare_memory_bytes: int = 2048 * MIB


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A token bucket for each API key (each client address where there are no keys)."""

    requests_per_second: float
    burst: int


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling where a request says nothing: the checkpoint's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """
    model_names      what clients may call the model; answers carry the first
    created          Unix time, for the list of models
    api_keys         none: no key is asked for
    open_paths       need no key; "/health" and whatever static pages the caller adds
    hosts            what the Host header may say
    priority_keys    keys whose requests may set a priority; "all": everybody's may
    prefix_cache_by_key  requests share cached prompts only with those of the same key
    cors_origins     origins whose pages may call us; "*": any
    template_kwargs  names a request may set in chat_template_kwargs
    log_prompts      write prompts to the log, with the ids of their answers
    """

    model_names: tuple[str, ...]
    created: int
    version: str
    api_keys: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset({"/health"})
    hosts: AllowedHosts = AllowedHosts(None)
    priority_keys: tuple[str, ...] = ()
    prefix_cache_by_key: bool = True
    cors_origins: tuple[str, ...] = ()
    rate_limit: RateLimit | None = None
    limits: Limits = field(default_factory=Limits)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    template_kwargs: tuple[str, ...] = ("thinking_mode",)
    log_prompts: bool = False
