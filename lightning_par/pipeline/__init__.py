"""Pipeline parallelism: schedules as tables, what proves and draws them, and the engine that executes one."""
