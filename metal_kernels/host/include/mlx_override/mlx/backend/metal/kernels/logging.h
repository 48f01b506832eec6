// In place of MLX's file: there is no os_log here.
#pragma once
