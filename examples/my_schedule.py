import numpy as np


def there_and_back(*, num_tasks: int, budget: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The tasks in order, then in reverse: each is visited twice, with half of its budget each time."""
    first = [(task, budget - budget // 2) for task in range(num_tasks)]
    second = [(task, budget // 2) for task in reversed(range(num_tasks))]
    return first + second
