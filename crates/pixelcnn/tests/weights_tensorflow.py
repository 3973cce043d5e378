"""Restores an exported checkpoint in TensorFlow, as the original's code would, and compares every
variable with the run's own checkpoint. By hand, since it needs TensorFlow:

    pip install tensorflow-cpu safetensors numpy
    pixelcnn export RUN --format tensorflow --out exported
    python tests/weights_tensorflow.py exported/params_cifar.ckpt RUN/checkpoints/step-....safetensors
"""

import sys

import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file

checkpoint, run = sys.argv[1:]
reader = tf.train.load_checkpoint(checkpoint)
shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()

# What a saver of TensorFlow 1 does on restoring: every variable by its name.
tf1 = tf.compat.v1
with tf.Graph().as_default(), tf1.Session() as session:
    variables = {
        name: tf1.get_variable(name, shape, types[name], tf1.zeros_initializer())
        for name, shape in shapes.items()
    }
    tf1.train.Saver(variables).restore(session, checkpoint)
    restored = session.run(variables)

expected = load_file(run)
parameters = [name for name in expected if name[-2:] in ("/V", "/g", "/b") or name.endswith("/hw")]
for name in parameters:
    for suffix in ("", "/ExponentialMovingAverage"):
        np.testing.assert_array_equal(restored[name + suffix], expected[name + suffix])

# Adam's state has no names: its arrays are compared as bags of bytes.
unnamed = [value for name, value in restored.items() if name.startswith("Variable")]
floats = [value for value in unnamed if value.dtype == np.float32]
steps = [value for value in floats if value.shape == ()]
bag = lambda values: sorted((v.shape, v.tobytes()) for v in values)
moments = [expected[name + moment] for name in parameters for moment in ("/adam_first", "/adam_second")]
assert bag(v for v in floats if v.shape != ()) == bag(moments)
print(f"{len(parameters)} parameters, averages and moments equal; Adam is about to take step {steps}")
