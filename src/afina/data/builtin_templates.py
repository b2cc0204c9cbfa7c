"""The chat templates that every base can use: `--chat-template plain` and `chatml`."""

PLAIN = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)
# tools stand in the system message; a call is JSON, in the form that the message describes
_TOOLS = (
    "{{ 'Functions that can be called, one in each line:' }}"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\nA call is written as\n<tool_call>\n' }}"
    '{{ \'{"name": "function", "arguments": {"name": "value"}}\n</tool_call>\' }}'
)
_CALLS = (
    "{% for call in message['tool_calls'] %}"
    "{% if not loop.first or message['content'] %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n{\"name\": ' + (call['function']['name'] | tojson) }}"
    "{{ ', \"arguments\": ' + (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}"
)
_THOUGHT = "{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' }}"
CHATML = (
    "{% if tools and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' }}"
    + _TOOLS
    + "{{ '<|im_end|>' }}{{ '\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] %}" + _THOUGHT + "{% endif %}"
    "{{ message['content'] or '' }}"
    "{% if loop.first and tools and message['role'] == 'system' %}{{ '\n\n' }}"
    + _TOOLS
    + "{% endif %}"
    "{% if message['tool_calls'] %}" + _CALLS + "{% endif %}"
    "{{ '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
