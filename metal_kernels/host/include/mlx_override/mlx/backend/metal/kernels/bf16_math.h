// In place of MLX's file: our metal:: functions take bfloat already.
#pragma once
